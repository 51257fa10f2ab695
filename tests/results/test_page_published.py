"""The section of what others published: every row, its errors those of its file, and whose the figures are."""

import json
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from helpers import ROOT
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.results import style
from qlora_lowmem.results.kinds import Section, published
from qlora_lowmem.results.page import sections_of
from qlora_lowmem.results.tables import Cell
from results.pages import parsed, table

main = partial(run_command, "report")

REALITY = ROOT / "results" / "reality.json"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """The committed rows, in the order of the page: by source."""
    found = json.loads(REALITY.read_text())["rows"]
    sources = list(dict.fromkeys(row["source"] for row in found))
    return sorted(found, key=lambda row: sources.index(row["source"]))


@pytest.fixture(scope="module")
def section() -> Section:
    (found,) = sections_of([REALITY]).sections
    return found


def columns(section: Section, header: str) -> list[Cell]:
    """That column of every table, "-" where a table has none."""
    (chart,) = section.charts
    return [
        row[found.headers.index(header)] if header in found.headers else Cell("-")
        for found in chart.tables
        for row in found.rows
    ]


def test_every_published_figure_is_a_row(section: Section, rows: list[dict[str, object]]) -> None:
    assert len(rows) == 64
    assert [cell.text for cell in columns(section, "run")] == [row["run"] for row in rows]
    assert [cell.value for cell in columns(section, "predicted")] == [row["plan_bytes"] for row in rows]
    peaks = [None if row["measures"] == "out of memory" else row["measured_bytes"] for row in rows]
    assert [cell.value for cell in columns(section, "measured by others")] == peaks
    explained = [row["explained_bytes"] or None for row in rows]
    assert [cell.value for cell in columns(section, "explained")] == explained


@pytest.mark.parametrize(
    ("header", "field"),
    [("error", "difference"), ("unexplained", "left"), ("the program itself", "program_difference")],
)
def test_errors_are_those_of_the_file(section: Section, rows: list[dict[str, object]], header: str, field: str) -> None:
    expected = [None if row[field] is None else float(f"{row[field]:.6g}") for row in rows]
    assert [cell.value for cell in columns(section, header)] == expected
    assert sum(value is not None for value in expected) > 30


def test_the_summary_says_what_the_file_says(section: Section) -> None:
    summary = json.loads(REALITY.read_text())["summary"]
    (chart,) = section.charts
    assert (
        f"Worst error of {summary['allocated_rows']} (allocated): {summary['worst_difference']:.1%}, "
        f"{summary['worst_left']:.1%} with what is explained."
    ) in chart.summary
    rounded, agree = summary["rounded_rows"], summary["rounded_rows_that_agree"]
    assert f"{agree} of {rounded} figures that were published rounded, or as out of memory, agree" in chart.summary


def test_it_is_said_that_others_measured(soup: BeautifulSoup, tmp_path: Path) -> None:
    """At the end, in the section and under it; the title names no card of theirs."""
    assert "measured by others" in soup.find(class_="made-of").p.find_next("p").get_text()
    found = soup.find(id="published").find_parent("section")
    assert "None of the measured figures is ours" in found.get_text()
    (badge,) = [tag for tag in found.find(class_="provenance").find_all(class_="badge") if "others" in tag.get_text()]
    assert "by tiny" in badge.parent.get_text()
    verdicts = [row[7].get_text() for row in table(soup, "chart-published-table-1")]
    assert verdicts == ["-", "-", "agrees", "-", "does not agree"]
    output = tmp_path / "report.html"
    assert main([str(REALITY), "--output", str(output)]) == 0
    page = parsed(output)
    assert page.title.get_text() == "GPU memory, predicted and published"
    assert "Every figure of this project is virtual" in " ".join(page.find(class_="lead").get_text().split())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("explained", [0, 2**30])
def test_one_figure_is_drawn(narrow: bool, explained: int) -> None:
    name = "_$\\frac{" + "b" * 300
    point = published.Published(name, "a run", "a card", "allocated", 2**32, "", 2**32, explained, None, None)
    text = style.svg_text(lambda look: published.published(look, [point]), style.Style(style.LIGHT, narrow))
    words = {element.text for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"measured by others, GiB", "dashed: equal", "allocated"} <= words
    assert ("filled: with what is explained" in words) == bool(explained)
