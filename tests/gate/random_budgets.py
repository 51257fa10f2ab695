"""Random programs as tests of a user's project, with budgets about their peaks, and how each ended."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gate.random_programs import CARD, Program

_TESTS = f"""\
import json, pathlib, pytest
from gate.random_programs import Program, run

CASES = json.loads(pathlib.Path(__file__).with_name("programs.json").read_text())


def marked(case):
    return pytest.param(case["steps"], id=case["name"], marks=pytest.mark.vram_budget(case["limit"], card="{CARD}"))


@pytest.mark.parametrize("steps", [marked(case) for case in CASES])
def test_program(steps):
    run(Program(steps))
"""


@dataclass(frozen=True)
class Ended:
    """Whether the test of a program passed, what the gate found allocated, and what the failure says."""

    passed: bool
    allocated: int
    said: str


def write_tests(folder: Path, cases: Iterable[tuple[str, Program, int]]) -> None:
    """Write a test for each (name, program, limit)."""
    content = [{"name": name, "steps": each.steps, "limit": limit} for name, each, limit in cases]
    (folder / "programs.json").write_text(json.dumps(content))
    (folder / "test_programs.py").write_text(_TESTS)


def read_ends(junit: Path) -> dict[str, Ended]:
    """How they ended, by name, from what `pytest --junitxml` wrote."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        said = "\n".join(
            each.get("message") or each.text or "" for each in (*case.iter("failure"), *case.iter("error"))
        )
        name = str(case.get("name")).partition("[")[2].rstrip("]")
        found[name] = Ended(not said, int(properties.get("vram_allocated_bytes") or -1), said)
    return found
