"""The gate's verdicts: each case, what it used, what that is held against."""

from collections.abc import Sequence
from typing import Any

from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.verdicts import FIGURES, Held, Row, verdicts
from qlora_lowmem.results.tables import Cell, Table
from qlora_lowmem.units import MIB, format_signed


def recognises(content: dict[str, Any]) -> bool:
    """Cases with a verdict."""
    cases = content.get("cases")
    return isinstance(cases, list) and any(isinstance(case, dict) and "verdict" in case for case in cases)


def read(content: Fields) -> tuple[Provenance, tuple[Row, ...]]:
    """The cases of a `gate.json`.

    Raises:
        ValueError, KeyError, TypeError: what is wrong with it.
    """
    rows = []
    for case in content.objects("cases"):
        for name in ("case", "file", "verdict", "message"):
            case.text(name)
        case.flag("fails")
        if case["budget"] is not None:
            budget = case.object("budget")
            budget.count("limit")
            if budget["of"] not in FIGURES:
                raise ValueError(f"cases: a budget of {budget['of']!r}, which is not one of {', '.join(FIGURES)}")
        rows.append(Row.from_dict(case.raw))
    return provenance_of(content), tuple(rows)


def sections(found: Sequence[tuple[Source, tuple[Row, ...]]]) -> list[Section]:
    """One section a file."""
    return [_section(source, rows, len(found) > 1) for source, rows in found]


def _section(source: Source, rows: tuple[Row, ...], several: bool) -> Section:
    failing = [row for row in rows if row.fails]
    head = f"{len(failing)} of {len(rows)} cases fail" if failing else f"All {len(rows)} cases hold"
    names = f": {', '.join(row.case for row in failing)}" if failing else ""
    held = [Held(row.case.rpartition("::")[2], row.judged, row.held_against, row.fails) for row in rows if row.record]
    chart = Chart(
        "verdicts", "What each case used", f"{head}{names}.", lambda style: verdicts(style, held), (_table(rows),)
    )
    told = [row for row in rows if row.message]
    messages = Table(
        "What the gate says of them",
        ("case", "verdict", "message"),
        tuple((Cell(row.case), _verdict(row), Cell(row.message)) for row in told),
    )
    return Section(
        name="verdicts",
        title=f"Verdicts of the gate{f', {source.provenance.device}' if several else ''}",
        text="A case is held against its recorded baseline or its budget. REGRESSED, OVER BUDGET, NOT COMPARABLE and "
        "MISSING fail.",
        sources=(source,),
        charts=(chart,) if held else (),
        tables=(*(() if held else (_table(rows),)), *((messages,) if told else ())),
        highlights=((f"{len(failing)} of {len(rows)}", "cases of the gate fail"),),
    )


def _verdict(row: Row) -> Cell:
    return Cell(row.verdict, tone="bad" if row.fails else "good")


def _table(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        against, record = row.held_against, row.record
        sizes = [_mib(getattr(record, what) if record else None) for what in ("allocated", "reserved", "device")]
        change = row.judged - against if against is not None and record else None
        cells.append(
            (
                Cell(row.case),
                _verdict(row),
                sizes[0],
                _mib(against),
                Cell(format_signed(change), change) if change is not None else Cell("-"),
                *sizes[1:],
            )
        )
    headers = ("case", "verdict", "allocated", "held against", "difference", "reserved", "on the card")
    return Table("Peaks in MiB, and what they are held against", headers, tuple(cells))


def _mib(count: int | None) -> Cell:
    return Cell("-") if count is None else Cell(f"{count / MIB:,.1f}", count)
