"""The gate's verdicts: each case, what it used, and what that is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import msgspec

from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases
from qlora_lowmem.results.style import Figure, Style
from qlora_lowmem.results.tables import Cell, Column, launches_column, markdown_of, page_table
from qlora_lowmem.units import MIB, format_bytes, format_signed

PeakFigure = Literal["allocated", "reserved", "device"]
FIGURES: tuple[PeakFigure, ...] = get_args(PeakFigure)


@dataclass(frozen=True)
class Key:
    """What two runs must have in common for their bytes to be comparable.

    Attributes:
        provenance: `virtual` or `measured`.
        torch, cuda: with its build tag, `2.14.1+cu130`; the version that it was built for, `13.0`.
        transformers, peft, trl, bitsandbytes: versions, or `not installed`.
        allocator: options of the caching allocator.
        recipe: the recipe's hash; empty for a test, whose code is what is under test.
    """

    device: str
    provenance: str
    torch: str
    cuda: str
    transformers: str
    peft: str
    trl: str
    bitsandbytes: str
    allocator: str
    recipe: str = ""

    def differences(self, other: "Key") -> dict[str, tuple[str, str]]:
        """Fields in which `other` differs: name to (here, there)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class Record:
    """A case's peaks, in bytes.

    Attributes:
        allocated, reserved, device: the highest of all phases, as in `MemoryProfile`.
        phases: allocated peak by phase.
        kinds: bytes by kind (`memory.kinds.KINDS`) at the attributed peak; empty where it was not attributed.
        modules: requested bytes by the block of the model that holds them (`model.layers.4`) at that peak.
        lines: bytes by `kind | line of code` at that peak, the largest ones.
        versions: all that were installed and could matter, also those that the key leaves out.
        launches: kernels, copies and memsets, of a recipe's optimizer step or of a whole test; None where nobody
            counted them: on a GPU, and in older baselines.
    """

    key: Key
    allocated: int
    reserved: int
    device: int
    phases: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    launches: int | None = None


@dataclass(frozen=True)
class Budget:
    """What a test may use.

    Attributes:
        limit: in bytes.
        of: which figure: what tensors take (`allocated`), what torch took from the card for them (`reserved`), or
            that with the CUDA context (`device`).
        card: the virtual card that it runs on; not used with --vram-gpu.
        given: the limit as somebody wrote it, `6 GB`; empty where that was a number of bytes.
        launches: how many kernels, copies and memsets it may submit; None is any number. A GPU does not count them.
    """

    limit: int
    of: PeakFigure
    card: str
    given: str = ""
    launches: int | None = None

    def used(self, record: Record) -> int:
        """The figure that it is for, in bytes."""
        return int(getattr(record, self.of))

    def shown(self) -> str:
        """The limit, in the unit in which it was given."""
        return self.given or format_bytes(self.limit)


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: the recipe's name, or the test's node id.
        file: the file that states it, from the project's root on.
        verdict: a name of `gate.verdicts.Name`.
        record, baseline, budget: what it used, None if it came to nothing; what it is held against, if there is any.
        message: the failure or the advice, rendered.
        artefacts: files that a failing run left: its attribution, its snapshot.
    """

    case: str
    file: str
    verdict: str
    record: Record | None
    baseline: Record | None = None
    budget: Budget | None = None
    fails: bool = False
    message: str = ""
    artefacts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The case without the file of its test."""
        return self.case.rpartition("::")[2]

    @property
    def judged(self) -> int:
        """Bytes of the figure that is judged: the budget's, else what is allocated; 0 where it came to nothing."""
        of = self.budget.of if self.budget else "allocated"
        return getattr(self.record, of) if self.record else 0

    @property
    def held_against(self) -> int | None:
        """Bytes of the budget's limit or of the baseline; None where there is neither."""
        return self.budget.limit if self.budget else self.baseline.allocated if self.baseline else None

    def properties(self) -> list[tuple[str, object]]:
        """For JUnit, bytes as integers."""
        found: dict[str, object] = {"vram_verdict": self.verdict}
        if self.record is not None:
            found["vram_card"] = self.record.key.device
            found |= {f"vram_{figure}_bytes": getattr(self.record, figure) for figure in FIGURES}
            if self.record.launches is not None:
                found["vram_launches"] = self.record.launches
        if self.baseline is not None:
            found["vram_baseline_allocated_bytes"] = self.baseline.allocated
        if self.budget is not None:
            found["vram_limit_bytes"] = self.budget.limit
        return list(found.items())


def _mib(count: int | None) -> Cell:
    return Cell("-") if count is None else Cell(f"{count / MIB:,.1f}", count)


def _held_against(row: Row) -> Cell:
    return Cell(row.budget.shown(), row.budget.limit) if row.budget else _mib(row.held_against)


def _difference(row: Row) -> Cell:
    if row.held_against is None or row.record is None:
        return Cell("-")
    change = row.judged - row.held_against
    return Cell(format_signed(change, row.budget.given if row.budget else ""), change)


_MESSAGE = Column[Row]("message", lambda row: Cell(row.message))
_COLUMNS: tuple[Column[Row], ...] = (
    Column("case", lambda row: Cell(row.case)),
    Column("verdict", lambda row: Cell(row.verdict, tone="bad" if row.fails else "good")),
    Column("allocated MiB", lambda row: _mib(row.record.allocated if row.record else None), "allocated"),
    Column("held against MiB", _held_against, "held against"),
    Column("difference", _difference),
    Column("reserved MiB", lambda row: _mib(row.record.reserved if row.record else None), "reserved"),
    Column("on the card MiB", lambda row: _mib(row.record.device if row.record else None), "on the card"),
    launches_column("launches", lambda row: row.record.launches if row.record else None),
)


def verdicts_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown_of(_COLUMNS, rows, text_columns=2)


def _read(content: Mapping[str, Any]) -> tuple[Row, ...]:
    try:
        return msgspec.convert(content, Cases[Row]).cases
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at `$.")
        if place.endswith(".of`"):
            why = f"a budget of {why.split()[-1]}, which is not one of {', '.join(FIGURES)}"
        raise ValueError(f"{place.rstrip('`')}: {why}") from None


def _section(provenance: Provenance, rows: tuple[Row, ...]) -> Section:
    failing = [row for row in rows if row.fails]
    summary = f"All {len(rows)} cases hold."
    if failing:
        summary = f"{len(failing)} of {len(rows)} cases fail: {', '.join(row.case for row in failing)}."
    held = [row for row in rows if row.record]
    table = page_table("Peaks in MiB, and what they are held against", _COLUMNS, rows)
    title, where = "What each case used", provenance.where
    chart = Chart("verdicts", title, where, summary, lambda style: verdicts(style, held), (table,))
    told = [row for row in rows if row.message]
    messages = page_table("What the gate says of them", (*_COLUMNS[:2], _MESSAGE), told)
    return Section(
        name="verdicts",
        title="Verdicts of the gate",
        text="A case is held against its recorded baseline or its budget. REGRESSED, OVER BUDGET, NOT COMPARABLE, "
        "NOT COUNTED and MISSING fail.",
        charts=(chart,) if held else (),
        tables=(*(() if held else (table,)), *((messages,) if told else ())),
        highlights=((f"{len(failing)} of {len(rows)}", "cases of the gate fail"),),
    )


KIND = Kind("verdicts (pytest --vram-report)", has_rows("cases", "verdict"), _read, each_its_own(_section))


def verdicts(style: Style, rows: Sequence[Row]) -> Figure:
    """A bar a case, of those with a record, a mark at its baseline or limit; what fails is striped and says so."""
    figure = style.figure(style.row_height * len(rows) + (1.2 if style.narrow else 0.8))
    axes = figure.subplots()
    places, height = style.name_rows(axes, [row.name for row in rows])
    ends = [max(row.judged, row.held_against or 0) / MIB for row in rows]
    for place, row, end in zip(places, rows, ends, strict=True):
        facecolor, hatch, fails = ("bad", "///", ", fails") if row.fails else ("bar", None, "")
        look = style.look(facecolor=facecolor, edgecolor="paper", hatch=hatch)
        axes.barh(place, row.judged / MIB, height=height, linewidth=0, **look)
        if row.held_against is not None:
            style.tick(axes, row.held_against / MIB, place, height / 2 + 0.08, "floor")
        style.words(axes, f"{format_bytes(row.judged)}{fails}", end, place)
    largest = max(ends, default=1)
    axes.set_xlim(0, largest * (1.5 if style.narrow else 1.2))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4 if style.narrow else 8)
    axes.set_xlabel("MiB; the mark is the baseline or limit" if style.narrow else _EXPLAINED)
    style.plain(axes, grid="x")
    return figure


_EXPLAINED = "MiB at the peak that is judged; the mark is the baseline or the limit; striped fails"
