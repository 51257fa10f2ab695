"""The one layout of peaks by phase: what the benchmark and the command write, and how memory that ran out is told."""

import csv
import json
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands import phases
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.plan.questions import Life
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.phases import phase_bytes, write_phases
from qlora_lowmem.results.page import sections_of
from results.examples import CARD, ENVIRONMENT

PEAKS = {"load": Peak(1, 2, 3), "steady": Peak(4, 5, 6)}


def life(**out_of_memory: str) -> Life:
    profile = MemoryProfile(CARD, "virtual", 6 * 2**30, 0, PEAKS)
    return Life(load_recipe(RECIPES / "lean.yaml"), profile, out_of_memory, 0 if out_of_memory else 2)


@pytest.mark.parametrize(
    ("ran_out", "expected"),
    [
        ({}, [("load", 3, ""), ("steady", 6, "")]),
        ({"steady": "no room"}, [("load", 3, ""), ("steady", 6, "no room")]),
        ({"save": "no room"}, [("load", 3, ""), ("steady", 6, ""), ("save", 0, "no room")]),
        ({"resume": ""}, [("load", 3, ""), ("resume", 0, "out of memory"), ("steady", 6, "")]),
        ({"training": "no room"}, [("load", 3, ""), ("steady", 6, "no room")]),
    ],
)
def test_memory_that_ran_out_is_a_field_of_its_phase(
    ran_out: dict[str, str], expected: list[tuple[str, int, str]]
) -> None:
    """Whether that phase had readings or not; between two phases it counts to the last."""
    found = phase_bytes(PEAKS, 7, out_of_memory=ran_out)
    assert [(each.phase, each.peak.device, each.out_of_memory) for each in found] == expected
    assert [each.fails for each in found] == [bool(message) for *_, message in expected]
    assert {(each.allocated_budget, each.device_budget) for each in found} == {(None, 7)}


def test_memory_that_ran_out_before_any_phase_counts_to_the_first() -> None:
    (found,) = phase_bytes({}, 7, out_of_memory={"training": "no room"})
    assert (found.phase, found.peak.device, found.out_of_memory) == ("load", 0, "no room")


def test_the_files_say_where_memory_ran_out(tmp_path: Path) -> None:
    lives = {"a": life(steady="no room").phases(7, {"load": 8, "steady": 9}), "b": life().phases(7)}
    write_phases(tmp_path, "a-model", lives, ENVIRONMENT, "An example.")
    cases = json.loads((tmp_path / "phases.json").read_text())["cases"]
    assert [case["out_of_memory"] for case in cases] == [None, "no room", None, None]
    assert [case["allocated_budget_bytes"] for case in cases] == [8, 9, None, None]
    assert [case["floor_bytes"] for case in cases] == [0, 0, 2, 2]
    with (tmp_path / "phases.csv").open(newline="") as file:
        assert [row["out_of_memory"] for row in csv.DictReader(file)] == ["", "no room", "", ""]
    page = (tmp_path / "phases.md").read_text()
    assert "- a, steady: no room\n" in page
    assert "An example. Reserved does not fall" in page
    beside = [line.replace(" ", "") for line in page.split("beside the floor")[1].splitlines() if line.startswith("| ")]
    assert beside == [
        "|recipe|highestin|allocated|floor|xfloor|",
        "|a|steady|0.000|-|-|",
        "|b|steady|0.000|0.000|2.00|",
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_command_writes_what_the_page_reads(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two recipes of one name stay two; the exit code says whether all fit; the floor is told where it is known."""
    lives = iter([life(), life(steady="no room") if fails else life()])
    monkeypatch.setattr(phases, "live", lambda *_: next(lives))
    path = tmp_path / "mine.json"
    config = str(RECIPES / "lean.yaml")
    arguments = ["--config", config, config, "--card", CARD, "--json", str(path)]
    assert run_command("phases", arguments) == (3 if fails else 0)
    assert capsys.readouterr().err.count("allocated is 2.00 times the floor\n") == (1 if fails else 2)
    cases = json.loads(path.read_text())["cases"]
    assert [case["recipe"] for case in cases] == ["lean (1)"] * 2 + ["lean (2)"] * 2
    assert {case["device_budget_bytes"] for case in cases} == {virtual_gpu.get_card(CARD).usable_bytes}
    (section,) = sections_of([path]).sections
    assert section.name == "phases"
    assert section.highlights[0][0] == ("3 of 4" if fails else "4 of 4")
    assert [len(found.rows) for found in section.tables] == ([2, 1] if fails else [2])
