"""What a kind of result is made of: columns said once, and rows that come back from their files as they were."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.results.kinds import Provenance, Section, Source, each_its_own, has_rows, together
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.tables import (
    Cell,
    Column,
    launches_column,
    markdown_of,
    page_table,
    phase_table,
    plain_row,
    write_rows,
)
from qlora_lowmem.virtual_gpu import Launches
from results.examples import ENVIRONMENT

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One of each kind of field."""

    name: str
    fits: bool
    peak: Peak
    limit: int | None
    note: str = "none"


ROWS = (Row("a", True, Peak(GIB, 2 * GIB, 3 * GIB), None), Row("b", False, Peak(4 * GIB, 5 * GIB, 0), 7, "mine"))
COLUMNS: tuple[Column[Row], ...] = (
    Column("recipe", lambda row: Cell(row.name)),
    Column("allocated GiB", lambda row: Cell.gib(row.peak.allocated), "allocated"),
    Column("on the card", lambda row: Cell.known_gib(row.peak.device)),
    Column("x floor", lambda row: Cell.times_floor(row.peak.allocated, 2 * GIB)),
    Column("fits", lambda row: Cell("yes" if row.fits else "no"), page_cell=lambda _: Cell("fits", tone="good")),
)


def test_columns_are_said_once() -> None:
    """For Markdown and for a page, which may differ in a heading or a cell."""
    lines = [line.replace(" ", "") for line in markdown_of(COLUMNS, ROWS).splitlines()]
    assert lines[0] == "|recipe|allocatedGiB|onthecard|xfloor|fits|"
    assert lines[2:] == ["|a|1.000|3.000|0.50|yes|", "|b|4.000|-|2.00|no|"]
    table = page_table("A caption", COLUMNS, ROWS)
    assert table.headers == ("recipe", "allocated", "on the card", "× floor", "fits")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["a", "1.000", "3.000", "0.50", "fits"],
        ["b", "4.000", "-", "2.00", "fits"],
    ]
    assert [cell.value for cell in table.rows[1]] == [None, 4 * GIB, None, 2.0, None]
    assert table.figures == {1, 2, 3}


def test_launches_stand_where_somebody_counted() -> None:
    """Some rows may not have them; where none has, as on a GPU, there is no such column."""
    columns = (*COLUMNS[:1], launches_column("launches", lambda row: row.limit))
    lines = [line.replace(" ", "") for line in markdown_of(columns, ROWS).splitlines()]
    assert [lines[0], *lines[2:]] == ["|recipe|launches|", "|a|-|", "|b|7|"]
    assert "launches" not in markdown_of(columns, ROWS[:1])
    assert page_table("A caption", columns, ROWS).headers == ("recipe", "launches")
    assert page_table("A caption", columns, ROWS[:1]).headers == ("recipe",)


def test_the_table_of_a_run_has_its_launches() -> None:
    measured = MemoryProfile("card", "measured", GIB, 0, {"load": Peak(), "steady": Peak()})
    assert "launches" not in phase_table(measured)
    virtual = MemoryProfile("card", "virtual", GIB, 0, measured.phases, {"steady": Launches(15_000, 400, 3)})
    shown = [line.split() for line in phase_table(virtual).splitlines()]
    assert next(line for line in shown if line[:1] == ["steady"])[-1] == "15,403"
    assert next(line for line in shown if line[:1] == ["load"])[-1] == "0.000"


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """A peak stands as three fields, in the place of its own."""
    write_rows(tmp_path, "rows", ROWS, ENVIRONMENT, title="Rows", parts=("A text.",), head={"device": "a card"})
    content = json.loads((tmp_path / "rows.json").read_text())
    assert list(content) == ["environment", "device", "cases"]
    assert list(content["cases"][0]) == [
        *("name", "fits", "peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "limit", "note")
    ]
    assert read_as(Cases[Row], content).cases == ROWS
    assert (tmp_path / "rows.csv").read_text().splitlines()[2] == f"b,False,{4 * GIB},{5 * GIB},0,7,mine"
    assert (tmp_path / "rows.md").read_text().startswith("# Rows\n\nA text.\n\nFigures are **virtual** on")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "cases[0].name: 5 is not a text"),
        ({"fits": 1}, "cases[0].fits: 1 is not true or false"),
        ({"limit": "7"}, "cases[0].limit: '7' is not a whole number"),
        ({"peak_device_bytes": None}, "cases[0].peak_device_bytes: None is not a whole number"),
    ],
)
def test_a_field_of_another_kind_is_named(change: dict[str, object], message: str) -> None:
    content = {"cases": [plain_row(ROWS[0]) | change]}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its words are compared
        read_as(Cases[Row], content)
    assert message in str(error.value)


def test_only_what_has_a_default_may_be_absent() -> None:
    plain = plain_row(ROWS[0])
    assert read_as(Row, {k: v for k, v in plain.items() if k != "note"}) == ROWS[0]
    with pytest.raises(ValueError, match="limit is missing"):
        read_as(Row, {k: v for k, v in plain.items() if k != "limit"})
    with pytest.raises(ValueError, match="peak_reserved_bytes is missing"):
        read_as(Row, {k: v for k, v in plain.items() if k != "peak_reserved_bytes"})


def test_a_file_is_known_by_the_fields_of_its_rows() -> None:
    recognises = has_rows("cases", "tokens", "fits")
    assert recognises({"cases": [{}, {"tokens": 1, "fits": True, "more": 0}]})
    assert not recognises({"cases": [{"tokens": 1}, {"fits": True}]})
    assert not recognises({"rows": [{"tokens": 1, "fits": True}]})
    assert not recognises({"cases": {"tokens": 1, "fits": True}})


SOURCES = [
    Source(file, Provenance("virtual", card, "", {}, "", "", ""))
    for file, card in (("a.json", "one"), ("b.json", "two"))
]


def test_sections_of_one_kind_are_told_apart_by_device() -> None:
    """One needs no name, and others' figures have a card each."""
    own = each_its_own(lambda _, text: Section("s", "Title", text))
    assert [section.title for section in own([(SOURCES[0], "x")])] == ["Title"]
    found = own([(source, "x") for source in SOURCES])
    assert [(section.title, section.sources) for section in found] == [
        ("Title, one", (SOURCES[0],)),
        ("Title, two", (SOURCES[1],)),
    ]
    quoted = each_its_own(lambda _, text: Section("s", "Title", text, quoted="by them"))
    assert [section.title for section in quoted([(source, "x") for source in SOURCES])] == ["Title", "Title"]


@pytest.mark.parametrize(
    ("names", "shown"), [(("x", "y"), "x y"), (("x", "x"), "x (a) x (b)"), (("", "x"), "a x"), (("", ""), "a b")]
)
def test_runs_of_one_name_are_told_apart_by_file(names: tuple[str, str], shown: str) -> None:
    made = together(lambda runs: Section("s", "Title", " ".join(name for name, _ in runs)))
    (section,) = made([(source, (name, 0)) for source, name in zip(SOURCES, names, strict=True)])
    assert section.text == shown
    assert section.sources == tuple(SOURCES)


def test_tables_need_no_drawing_library() -> None:
    """All kinds are there, and nothing is drawn yet."""
    code = "import sys, qlora_lowmem.results.page; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
