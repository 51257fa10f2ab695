"""What machines and people read of a session."""

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
import yaml

from gate.examples import KEY, record
from helpers import ROOT
from qlora_lowmem.gate.budget import budget_of, over_budget
from qlora_lowmem.gate.report import annotations, summary, trend, write_report
from qlora_lowmem.results.kinds.verdicts import Budget, Row, verdicts_table

RECORD = {
    "provenance": "virtual",
    "device": "card",
    "driver": "none",
    "versions": {"torch": "2"},
    "commit": "c",
    "command": "pytest",
    "date": "2026-01-01",
}
ROWS = [
    Row("a", "bench/test_baselines.py", "PASS", record(2**30), record(2**30)),
    Row("b", "test_b.py", "REGRESSED", record(2**31), record(2**30), fails=True, message="more:\n100%, twice"),
    Row("t.py::c", "t.py", "OVER BUDGET", record(5), None, Budget(4, "allocated", "card"), True, "over"),
    Row("gone", "t.py", "MISSING", None, record(5), fails=True, message="gone"),
]


def test_rows_survive_the_way_between_processes() -> None:
    for row in ROWS:
        assert msgspec.convert(json.loads(json.dumps(msgspec.to_builtins(row))), Row) == row


def test_trend() -> None:
    entries = trend(ROWS)
    assert entries[0] == {
        "name": "a: allocated",
        "unit": "bytes",
        "value": 2**30,
        "extra": "PASS on rtx-4050-laptop-6gb (virtual)",
    }
    assert len(entries) == 6


def test_annotations_are_escaped() -> None:
    lines = annotations(ROWS)
    assert lines[0] == "::error file=test_b.py,title=GPU memory%3A REGRESSED::more:%0A100%25, twice"
    assert len(lines) == 3


def test_summary() -> None:
    text = summary(ROWS, RECORD)
    for said in ("3 of 4 cases fail", "| a ", "+1.000 GiB", "xychart-beta", "<details open>", "**virtual**"):
        assert said in text


def test_report_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(tmp_path / name, ROWS, RECORD)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_budget_without_attribution_still_says_the_sizes() -> None:
    bare = dataclasses.replace(record(7), kinds={}, modules={}, lines={})
    text = over_budget("t.py::c", Budget(4, "allocated", KEY.device), bare).render()
    assert "allocated 7 B, limit 4 B: 3 B over (7 - 4 = 3 bytes)" in text


def test_a_budget_is_shown_in_the_unit_in_which_it_was_given() -> None:
    over = dataclasses.replace(record(6_200_000_000), kinds={}, modules={}, lines={})
    budget = budget_of(("6 GB",), {}, None, "t4-16gb")
    assert "allocated 6.200 GB, limit 6 GB: 0.200 GB over (" in over_budget("t.py::c", budget, over).render()
    table = verdicts_table([Row("t.py::c", "t.py", "OVER BUDGET", over, None, budget, True, "over")])
    assert "|               6 GB |    +0.200 GB |" in table


@pytest.mark.parametrize("name", ["ci.yml", "nightly-gpu.yml"])
def test_workflows(name: str) -> None:
    """Pinned by commit, least permissions, time limits, tox for everything, and no fork's code on our own runner."""
    text = (ROOT / ".github" / "workflows" / name).read_text()
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    environments = (ROOT / "tox.ini").read_text()
    for job in content["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 180
        for step in job["steps"]:
            if "uses" in step:
                assert len(step["uses"].partition("@")[2]) == 40
                continue
            command = step["run"]
            _, named, rest = command.partition("tox run -e ")
            assert named or "pip install tox" in command or command == "nvidia-smi"
            assert not named or f"[testenv:{rest.split()[0]}]" in environments
    if "self-hosted" in text:
        assert set(content[True]) == {"schedule", "workflow_dispatch"}  # YAML reads `on` as true
