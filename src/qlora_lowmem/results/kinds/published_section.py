"""Predicted against measured by others: published fine-tuning peaks of real cards, and the plan's figure of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.published import FIGURES, Published, published
from qlora_lowmem.results.tables import Cell, Table, gib, gib_cell, ratio_cell

_OUT_OF_MEMORY = "out of memory"  # in the place of a figure: no peak was published, only that a card was too small


@dataclass(frozen=True)
class Row:
    """A published figure beside the plan's.

    Attributes:
        point: None where no peak was published; then `measured` is the memory of the card that was too small.
        agrees: whether the plan is within the rounding of a figure that was published rounded, or out of memory too;
            None for other rows.
        program: bytes of the measured program itself, run on the virtual card; None where it is not stated.
    """

    source: str
    run: str
    versions: str
    card: str
    figure: str
    measured: int
    planned: int
    point: Published | None
    agrees: bool | None
    program: int | None


def recognises(content: dict[str, Any]) -> bool:
    """Rows that say what was measured and what of it is explained."""
    rows = content.get("rows")
    fields = {"plan_bytes", "measured_bytes", "explained_bytes"}
    return isinstance(rows, list) and any(isinstance(row, dict) and fields <= row.keys() for row in rows)


def read(content: Fields) -> tuple[Provenance, tuple[Row, ...]]:
    """The rows of a `reality.json`, in bytes.

    Raises:
        ValueError: a field is missing or of another kind; a figure of 0 bytes; no row with a peak.
    """
    rows = tuple(_row(row) for row in content.objects("rows"))
    if not any(row.point for row in rows):
        raise ValueError("rows: none has a peak")
    return provenance_of(content), rows


def _row(row: Fields) -> Row:
    source, figure, run = row.text("source"), row.text("measures"), row.text("run")
    if figure not in {*FIGURES, _OUT_OF_MEMORY}:
        raise ValueError(f"rows: {figure!r} is not one of {', '.join((*FIGURES, _OUT_OF_MEMORY))}")
    measured, planned = row.count("measured_bytes"), row.count("plan_bytes")
    if not (measured and planned):
        raise ValueError(f"rows: a figure of {run!r} is 0 bytes")
    point = Published(source, figure, measured, planned, row.count("explained_bytes"))
    return Row(
        source,
        run,
        row.text("measured_versions"),
        row.text("virtual_card"),
        figure,
        measured,
        planned,
        None if figure == _OUT_OF_MEMORY else point,
        None if row["agrees_with_its_rounding"] is None else row.flag("agrees_with_its_rounding"),
        None if row["program_bytes"] is None else row.count("program_bytes"),
    )


def sections(found: Sequence[tuple[Source, tuple[Row, ...]]]) -> list[Section]:
    """One section a file."""
    return [_section(source, rows) for source, rows in found]


def _section(source: Source, rows: tuple[Row, ...]) -> Section:
    points = [row.point for row in rows if row.point]
    groups = dict.fromkeys(row.source for row in rows)
    chart = Chart(
        "published",
        "Predicted against measured by others",
        _summary(rows),
        lambda style: published(style, points),
        tuple(_table(group, [row for row in rows if row.source == group]) for group in groups),
    )
    allocated = [point for point in points if point.figure == "allocated"]
    highlights: tuple[tuple[str, str], ...] = ()
    if allocated:
        left, error = (max(abs(getattr(point, name)) for point in allocated) for name in ("left", "error"))
        text = (
            f"the worst error of {len(allocated)} allocated peaks that others published, with what is explained; "
            f"without, {error:.1%}"
        )
        highlights = ((f"{left:.1%}", text),)
    return Section(
        name="published",
        title="Predicted against measured: what others published",
        text="None of the measured figures is ours: others measured them on real cards and published them. Each run is "
        "written as a recipe and run on a virtual card of the same kind; that peak is what is predicted. Explained are "
        "bytes that the measured program holds, by its description, and a recipe's run does not; unexplained is the "
        "error that is left with them. What a source's are, and where its figures stand, is said in results/reality.md "
        "and bench/reality/README.md.",
        sources=(source,),
        charts=(chart,),
        highlights=highlights,
        quoted="published figures of real cards, by " + "; ".join(groups),
    )


def _summary(rows: Sequence[Row]) -> str:
    points = [row.point for row in rows if row.point]
    explained = [point for point in points if point.explained]
    texts = [f"{len(points)} published figures against the plan's; on the dashed line both are equal."]
    if explained:
        texts.append(f"For {len(explained)} of them a part of the difference is explained: the filled marks have it.")
    for name, (words, *_) in FIGURES.items():
        found = [point for point in points if point.figure == name]
        if found:
            error, left = (max(abs(getattr(point, each)) for point in found) for each in ("error", "left"))
            with_it = f", {left:.1%} with what is explained" if any(point.explained for point in found) else ""
            texts.append(f"Worst error of {len(found)} ({words}): {error:.1%}{with_it}.")
    rounded = [row.agrees for row in rows if row.agrees is not None]
    if rounded:
        texts.append(
            f"{sum(rounded)} of {len(rounded)} figures that were published rounded, or as out of memory, agree with "
            "the plan as such."
        )
    return " ".join(texts)


def _table(source: str, rows: Sequence[Row]) -> Table:
    versions = len({row.versions for row in rows}) > 1
    programs = any(row.program is not None for row in rows)
    verdicts = any(row.agrees is not None for row in rows)
    cells = []
    for row in rows:
        point, program = row.point, row.program
        words = FIGURES[row.figure][0] if point else _OUT_OF_MEMORY
        cells.append(
            (
                Cell(row.run),
                Cell(words),
                gib_cell(row.measured) if point else Cell(f"more than {gib(row.measured)}"),
                gib_cell(row.planned),
                _percent(point.error) if point else Cell("-"),
                gib_cell(point.explained) if point and point.explained else Cell("-"),
                _percent(point.left) if point else Cell("-"),
                *((_verdict(row.agrees),) if verdicts else ()),
                *((_program(program, row.measured),) if programs else ()),
                Cell(row.card),
                *((Cell(row.versions or "not stated"),) if versions else ()),
            )
        )
    headers = (
        "run",
        "figure",
        "measured by others",
        "predicted",
        "error",
        "explained",
        "unexplained",
        *(("as published",) if verdicts else ()),
        *(("the program itself",) if programs else ()),
        "virtual card",
        *(("versions",) if versions else ()),
    )
    said = "" if versions else f" Versions: {rows[0].versions or 'not stated'}."
    return Table(f"{source}, GiB.{said}", headers, tuple(cells))


def _percent(share: float) -> Cell:
    return ratio_cell(f"{share:+.2%}", share)


def _program(program: int | None, measured: int) -> Cell:
    return Cell("-") if program is None else _percent(program / measured - 1)


def _verdict(agrees: bool | None) -> Cell:
    if agrees is None:
        return Cell("-")
    return Cell("agrees", tone="good") if agrees else Cell("does not agree", tone="bad")
