"""200 random programs of several processes whose peak is known: each passes exactly when it is within its budget.

The programs are those of tests/gate/random_programs.py; here some start processes that import torch, and some compile
with Inductor. Budgets lie at the peak, a byte below, and some bytes above and below.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from gate.random_budgets import Ended, read_ends, write_tests
from gate.random_programs import CARD, Program, limit_of, program
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_page, markdown_table, write_result

pytestmark = pytest.mark.gate_property
COUNT, HEAVY_EVERY, COMPILED_EVERY = 200, 4, 40
TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Row:
    """Programs with a kind of step: how many, within and over budget by construction, and judged otherwise."""

    kind: str
    programs: int
    within: int
    over: int
    false_passes: int
    false_failures: int
    wrong_bytes: int


@dataclass(frozen=True)
class Case:
    """A program, its budget, and how its test ended."""

    program: Program
    limit: int
    ended: Ended

    @property
    def within(self) -> bool:
        """By construction."""
        return self.program.peak <= self.limit


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, results_folder: Path) -> list[Case]:
    folder = tmp_path_factory.mktemp("programs")
    programs = {
        str(seed): program(seed, heavy=seed % HEAVY_EVERY == 0, compiled=seed % COMPILED_EVERY == 0)
        for seed in range(COUNT)
    }
    limits = {name: limit_of(each, int(name)) for name, each in programs.items()}
    write_tests(folder, [(name, each, limits[name]) for name, each in programs.items()])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=junit.xml", "--tb=line"]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode in (0, 1)
    ends = read_ends(folder / "junit.xml")
    found = [Case(each, limits[name], ends[name]) for name, each in programs.items()]
    _write(results_folder, found)
    return found


def test_none_passes_or_fails_falsely(cases: list[Case]) -> None:
    wrong = [case for case in cases if case.ended.passed != case.within]
    assert not wrong, "\n\n".join(f"{case.program.steps}: {case.ended.said}" for case in wrong)
    assert min(Counter(case.within for case in cases).values()) > COUNT // 4, "both kinds are among them"


def test_every_peak_is_the_one_that_was_built(cases: list[Case]) -> None:
    assert [case.ended.allocated for case in cases] == [case.program.peak for case in cases]


def _write(folder: Path, cases: list[Case]) -> None:
    kinds = sorted({kind for case in cases for kind in case.program.kinds})
    rows = [_row("all", cases), *(_row(kind, [c for c in cases if kind in c.program.kinds]) for kind in kinds)]
    record = provenance_record(CARD, "virtual", None)
    headers = ["programs with", "programs", "within budget", "over", "false passes", "false failures", "wrong bytes"]
    table = markdown_table(headers, [list(map(str, asdict(row).values())) for row in rows])
    text = (
        "Programs of several processes whose peak is known by construction: what they do, how they start and end "
        "others. A budget is the peak or up to 8 MiB more, or a byte to 8 MiB less. False is what the gate says "
        "otherwise, wrong bytes a peak that is not the one that was built. A program has several kinds of steps."
    )
    page = markdown_page("The gate on random programs", [text, table], record)
    content = {"environment": record, "rows": [asdict(row) for row in rows]}
    write_result(folder, "gate-property", content, page, [asdict(row) for row in rows])


def _row(kind: str, cases: list[Case]) -> Row:
    within = [case for case in cases if case.within]
    over = [case for case in cases if not case.within]
    return Row(
        kind=kind,
        programs=len(cases),
        within=len(within),
        over=len(over),
        false_passes=sum(case.ended.passed for case in over),
        false_failures=sum(not case.ended.passed for case in within),
        wrong_bytes=sum(case.ended.allocated != case.program.peak for case in cases),
    )
