"""The section of the phases: its figures, its verdicts, and what it says of phases that are not there."""

import json
from pathlib import Path

from bs4 import BeautifulSoup

from qlora_lowmem.memory.profile import PHASES
from qlora_lowmem.results.page import sections_of
from results.pages import table, values

SIZES = ("allocated_bytes", "allocated_budget_bytes", "reserved_bytes", "device_bytes", "device_budget_bytes")


def test_the_phases_are_those_of_their_file(soup: BeautifulSoup, page_folder: Path) -> None:
    cases = json.loads((page_folder / "phases.json").read_text())["cases"]
    verdicts = {
        "whole": ["within budget"] * 8,
        "tiny": ["within budget"] * 2 + ["over: allocated", "within budget", "out of memory"],
    }
    for number, (recipe, expected) in enumerate(verdicts.items(), start=1):
        name = f"chart-phases-table-{number}"
        life = [case for case in cases if case["recipe"] == recipe]
        assert recipe in soup.find(id=name).get_text()
        assert [row[0].get_text() for row in table(soup, name)] == [case["phase"] for case in life]
        assert values(soup, name) == [[case[field] for field in SIZES] for case in life]
        assert [bool(case["out_of_memory"]) for case in life] == [text == "out of memory" for text in expected]
        assert [row[-1].get_text() for row in table(soup, name)] == expected
        assert ["bad" in row[-1]["class"] for row in table(soup, name)] == [
            text != "within budget" for text in expected
        ]
    assert soup.find(id="chart-phases-summary").get_text() == (
        "Out of memory: steady of tiny; the peaks there are those until then. Over budget: warm-up of tiny, steady of "
        "tiny. The most that the card holds, and the first phase with it: whole 5.000 of 6.000 GiB "
        "(merge), tiny 6.000 of 6.000 GiB (steady). Without figures: evaluate of tiny, save of tiny, merge of tiny."
    )
    assert "11 of 13" in soup.find(class_="highlights").get_text()


def test_phases_within_their_budgets_are_said_to_be(results: Path) -> None:
    """In the order of a run's life, whatever that of the file; a budget may be used to its last byte."""
    content = json.loads((results / "phases.json").read_text())
    cases = [case for case in content["cases"] if case["recipe"] == "whole"]
    cases[0]["allocated_bytes"] = cases[0]["allocated_budget_bytes"]
    (results / "phases.json").write_text(json.dumps(content | {"cases": cases[::-1]}))
    (section,) = sections_of([results / "phases.json"]).sections
    (chart,) = section.charts
    assert chart.summary.startswith("All 8 phases stay within their budgets.")
    assert "Without figures" not in chart.summary
    assert [row[0].text for row in chart.tables[0].rows] == list(PHASES)
    assert section.highlights[0][0] == "8 of 8"


def test_memory_that_ran_out_is_said(soup: BeautifulSoup) -> None:
    """By its phase, with what torch said; the bar of that phase is striped and says so."""
    (row,) = table(soup, "phases-table-2")
    assert [cell.get_text() for cell in row] == ["tiny", "steady", "CUDA out of memory."]
    drawing = soup.find(id="chart-phases").find_next("svg").get_text()
    assert "6.000, out of memory" in drawing
    assert "striped: over budget or out of memory" in drawing


def test_the_highest_phase_stands_beside_the_floor(soup: BeautifulSoup) -> None:
    """Of a run that memory ended before a step did, the floor is not known."""
    rows = [[cell.get_text() for cell in row] for row in table(soup, "phases-table-1")]
    assert rows == [["whole", "merge", "1.000", "0.500", "2.00"], ["tiny", "warm-up", "3.000", "-", "-"]]


def test_phases_without_budgets_have_no_column_of_them(results: Path) -> None:
    """As the command writes them: only what a job can use on the card is known."""
    content = json.loads((results / "phases.json").read_text())
    for case in content["cases"]:
        case["allocated_budget_bytes"] = None
    (results / "phases.json").write_text(json.dumps(content))
    (section,) = sections_of([results / "phases.json"]).sections
    assert "allocated budget" not in section.charts[0].tables[0].headers
    assert section.charts[0].summary.startswith("Out of memory: steady of tiny; the peaks there are those until then.")
    assert "Each phase has a budget for what tensors take" not in section.text
