"""The page in `results/` shows the results beside it, and those hold what the page is for."""

import json
from pathlib import Path

from helpers import ROOT
from qlora_lowmem.results.page import KINDS, named, sections_of
from results.examples import CARD
from results.pages import SECTIONS, parsed, table

# What is committed has no card of this project's own to measure, and no run of a person's.
COMMITTED = [name for name in SECTIONS if name not in {"runs", "prediction"}]


def test_the_committed_page_shows_the_committed_results() -> None:
    """Figures only: what a page was made with changes with every run that recorded them again. Nor a step over time,
    whose axis counts allocations: `pytest bench/` records that again, and it moves with code that moves no peak.
    """
    folder = ROOT / "results" / CARD
    soup = parsed(folder / "report.html")
    advice = "run the commands of docs/reading.md, The page"
    others = [ROOT / "results" / name for name in ("reality.json", "lean-families.json")]
    found = named(sections_of([folder, *others]).sections)
    assert [section.name for section in found] == COMMITTED
    assert [tag["id"] for tag in soup.main.find_all("h2")] == COMMITTED, advice
    for section in found:
        groups = [
            (section.name, section.tables),
            *((f"chart-{chart.name}", chart.tables) for chart in section.charts if "over time" not in chart.title),
        ]
        for name, tables in groups:
            for number, expected in enumerate(tables, start=1):
                cells = [[cell.get_text() for cell in row] for row in table(soup, f"{name}-table-{number}")]
                assert cells == [[cell.text for cell in row] for row in expected.rows], advice


def test_no_committed_result_is_of_two_kinds() -> None:
    for path in (ROOT / "results").rglob("*.json"):
        content = json.loads(path.read_text())
        assert sum(kind.recognises(content) for kind in KINDS) <= 1, path.name


def test_the_committed_verdicts_name_no_machine() -> None:
    """Every case of the gate is there with the file of its test as the repository has it."""
    cases = json.loads((ROOT / "results" / CARD / "gate.json").read_text())["cases"]
    baselines = json.loads((ROOT / "bench" / "baselines" / f"{CARD}.json").read_text())
    assert len(cases) > 10
    assert all((ROOT / case["file"]).is_file() and not Path(case["file"]).is_absolute() for case in cases)
    assert {case["case"] for case in cases} == set(baselines["cases"])


def test_the_committed_lengths_cross_the_line() -> None:
    """So that the chart shows where a card ends: the need of what does not fit is known, from a card with room."""
    content = json.loads((ROOT / "results" / CARD / "lengths.json").read_text())
    optimised = [case for case in content["cases"] if case["recipe"] == "optimised"]
    assert [case["fits"] for case in optimised] == [True] * 4 + [False]
    assert optimised[-2]["peak_device_bytes"] < content["usable_bytes"] < optimised[-1]["peak_device_bytes"]
