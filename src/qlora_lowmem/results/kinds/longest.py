"""The longest sequence that trains, recipe by recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results.kinds import Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Column, launches_column, markdown_of, page_table, write_rows
from qlora_lowmem.units import format_bytes


@dataclass(frozen=True)
class Longest:
    """The longest sequence of a recipe on a card, in tokens, and its peaks in bytes. 0 tokens: not even the shortest.

    Attributes:
        next_tokens: the shortest length that was seen not to fit; 0 where none was.
        limited_by: `memory`, or `limit` where the longest length asked for fits.
        floor_bytes, host_bytes: at that length: what no method avoids (`memory.owners`); page-locked host memory.
        launches: kernels, copies and memsets of a micro-batch of that length; None where nobody counted.
    """

    recipe: str
    card: str
    tokens: Count
    next_tokens: Count
    limited_by: str
    peak: Peak
    floor_bytes: Count
    host_bytes: Count
    launches: Count | None = None

    @property
    def launches_a_token(self) -> Cell:
        """What a token costs the host."""
        if self.launches is None or not self.tokens:
            return Cell("-")
        return Cell.ratio(f"{self.launches / self.tokens:.2f}", self.launches / self.tokens)


_COLUMNS: tuple[Column[Longest], ...] = (
    Column("recipe", lambda row: Cell(row.recipe)),
    Column("longest that trains", lambda row: Cell.count(row.tokens), "longest"),
    Column("does not fit", lambda row: _next(row, "(not looked further)"), page_cell=lambda row: _next(row)),
    Column("allocated", lambda row: Cell.known_gib(row.peak.allocated), "allocated GiB"),
    Column("floor", lambda row: Cell.known_gib(row.floor_bytes), "floor GiB"),
    Column("x floor", lambda row: Cell.times_floor(row.peak.allocated, row.floor_bytes)),
    Column("on the card", lambda row: Cell.known_gib(row.peak.device), "on the card GiB"),
    Column(
        "host",
        lambda row: Cell.gib(row.host_bytes),
        "pinned host memory",
        lambda row: Cell(format_bytes(row.host_bytes), row.host_bytes),
    ),
    launches_column("launches a micro-batch", lambda row: row.launches),
    Column("launches a token", lambda row: row.launches_a_token, where_known=True),
)


def _next(row: Longest, unknown: str = "not looked further") -> Cell:
    return Cell.count(row.next_tokens) if row.next_tokens else Cell(unknown)


def write_longest(
    folder: Path, model: str, rows: Sequence[Longest], record: dict[str, Any], changes: Mapping[str, str]
) -> None:
    """Write `longest` as JSON, Markdown and CSV; `changes` are fields of every recipe, from the command line."""
    changed = ", ".join(f"`{name}: {value}`" for name, value in changes.items())
    text = (
        f"{model}, tokens of one sample, batch 1, found by running each length (two optimizer steps of one or two "
        "micro-batches). Peaks in GiB; what a job can use of the card holds the CUDA context too; host is page-locked "
        f"memory. No length between the two columns was tried. {FLOOR_TEXT}"
        f"{f' Changed in every recipe: {changed}; so these are not the recipes of that name.' if changed else ''}"
    )
    title = f"The longest sequence on {record['device']}"
    table = markdown_of(_COLUMNS, [_as_run(row, changes) for row in rows])
    head = {"device": record["device"], "provenance": "virtual", "model": model, "changes": changes}
    write_rows(folder, "longest", rows, record, title=title, parts=(text, table), head=head)


def _as_run(row: Longest, changes: Mapping[str, str]) -> Longest:
    """Under a name that says what was changed, for the recipe of that name reaches another length."""
    changed = ", ".join(f"{name} {value}" for name, value in changes.items())
    return replace(row, recipe=f"{row.recipe} with {changed}") if changed else row


@dataclass(frozen=True)
class _File(Cases[Longest]):
    changes: Mapping[str, str]
    model: str = ""


def _section(_provenance: Provenance, file: _File) -> Section:
    rows = [_as_run(row, file.changes) for row in file.cases]
    best = max(rows, key=lambda row: row.tokens)
    return Section(
        name="longest",
        title="The longest sequence that trains",
        text="Tokens of one sample at batch size 1, found by running each length: two optimizer steps of one or two "
        "micro-batches. No length between the longest and the one that does not fit was tried.",
        tables=(page_table("Tokens, and peaks at the longest", _COLUMNS, rows),),
        highlights=((f"{best.tokens:,} tokens", f"the longest sequence that trains ({best.recipe})"),),
        model=file.model,
    )


KIND = Kind(
    "the longest sequences (longest --table)",
    has_rows("cases", "next_tokens"),
    partial(read_as, _File),
    each_its_own(_section),
)
