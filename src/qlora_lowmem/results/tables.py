"""Tables of figures: columns declared once, shown as Markdown and on a page; rows written as JSON and CSV."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tabulate import tabulate

from qlora_lowmem import virtual_gpu
from qlora_lowmem.files import write_whole
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.units import GIB, format_bytes
from qlora_lowmem.virtual_gpu import Launches

# For the text of a table that has the column.
FLOOR_TEXT = "The floor is what no method avoids: weights as stored, adapters with their state, two residual tensors."
# Why a reserved byte may differ from that of a recipe's own run, where runs are `plan.recipe_runs.shortened`.
SHORTENED_TEXT = "A step has two micro-batches at most: of more, a few MiB for the batches that wait are not in it."

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text: what people read.
        value: the figure behind it for machines, bytes as an integer; None for words.
        tone: `good` or `bad` for a verdict, `strong` for a subtotal, else empty.
    """

    text: str
    value: int | float | None = None
    tone: str = ""

    @classmethod
    def gib(cls, count: int, tone: str = "") -> "Cell":
        """Bytes as GiB, for a column that names the unit."""
        return cls(gib(count), count, tone)

    @classmethod
    def known_gib(cls, count: int | None) -> "Cell":
        """The same, with a dash for 0 and None, which stand for not known."""
        return cls.gib(count) if count else cls("-")

    @classmethod
    def launches(cls, count: int | None) -> "Cell":
        """How many there were, with a dash where nobody counted."""
        return cls("-") if count is None else cls.count(count)

    @classmethod
    def ratio(cls, text: str, value: float, tone: str = "") -> "Cell":
        """A figure without a unit of its own, to six digits for machines."""
        return cls(text, float(f"{value:.6g}"), tone)

    @classmethod
    def times_floor(cls, allocated_bytes: int, floor_bytes: int) -> "Cell":
        """An allocated peak as a multiple of its floor, with a dash where either is not known."""
        text = times_floor(allocated_bytes, floor_bytes)
        return cls(text) if text == "-" else cls.ratio(text, allocated_bytes / floor_bytes)

    @classmethod
    def count(cls, count: int) -> "Cell":
        """A number of things."""
        return cls(f"{count:,}", count)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; the caption has the unit of its figures."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def figures(self) -> frozenset[int]:
        """The columns, from 0, that hold figures."""
        return frozenset(column for row in self.rows for column, cell in enumerate(row) if cell.value is not None)


@dataclass(frozen=True)
class Column(Generic[_Row]):
    """A column of a table: its heading and its cells in Markdown, and on a page where they are others there.

    Attributes:
        where_known: it is left out of a table in which no row has a figure for it.
    """

    heading: str
    cell: Callable[[_Row], Cell]
    page_heading: str = ""
    page_cell: Callable[[_Row], Cell] | None = None
    where_known: bool = False


def launches_column(heading: str, count: Callable[[_Row], int | None]) -> Column[_Row]:
    """Of launches, which nobody counts on a GPU, and did not in older files."""
    return Column(heading, lambda row: Cell.launches(count(row)), where_known=True)


def _known(columns: Sequence[Column[_Row]], rows: Sequence[_Row]) -> list[Column[_Row]]:
    return [c for c in columns if not c.where_known or any(c.cell(row).value is not None for row in rows)]


def markdown_of(columns: Sequence[Column[_Row]], rows: Sequence[_Row], text_columns: int = 1) -> str:
    """The rows as a GitHub table; the first `text_columns` columns are text, the rest figures."""
    columns = _known(columns, rows)
    cells = [[column.cell(row).text for column in columns] for row in rows]
    return markdown_table([column.heading for column in columns], cells, text_columns)


def page_table(caption: str, columns: Sequence[Column[_Row]], rows: Sequence[_Row]) -> Table:
    """The rows as a table of a page."""
    columns = _known(columns, rows)
    headers = tuple(column.page_heading or column.heading.replace("x floor", "× floor") for column in columns)
    return Table(caption, headers, tuple(tuple((c.page_cell or c.cell)(row) for c in columns) for row in rows))


def peak_fields(peak: Peak) -> dict[str, int]:
    """A peak as it stands in files: `peak_allocated_bytes` and so on."""
    return {f"peak_{figure}_bytes": size for figure, size in dataclasses.asdict(peak).items()}


def plain_row(row: Any) -> dict[str, Any]:
    """A dataclass as it stands in files: a field under its name, a peak as its three."""
    found: dict[str, Any] = {}
    for name, value in vars(row).items():
        found |= peak_fields(value) if isinstance(value, Peak) else {name: value}
    return found


def gib(count: int) -> str:
    """Bytes as GiB with three decimals, for a table whose heading names the unit."""
    return f"{count / GIB:.3f}"


def known_gib(count: int) -> str:
    """The same, with a dash for 0, which stands for not known."""
    return gib(count) if count else "-"


def times_floor(allocated_bytes: int, floor_bytes: int) -> str:
    """An allocated peak as a multiple of its floor, with a dash where either is 0, which stands for not known."""
    return f"{allocated_bytes / floor_bytes:.2f}" if allocated_bytes and floor_bytes else "-"


def floor_lines(allocated_bytes: int, floor_bytes: int) -> tuple[str, str]:
    """The floor and the allocated peak as a multiple of it, for a terminal; `floor_bytes` is known, so not 0."""
    return (
        f"floor {format_bytes(floor_bytes)} (weights, adapters with their state, two residual tensors)",
        f"allocated is {times_floor(allocated_bytes, floor_bytes)} times the floor",
    )


def launches_in_words(launches: Launches) -> str:
    """`16,503 launches: 15,411 kernels, 1,092 copies, 0 memsets`."""
    parts = ", ".join(f"{count:,} {kind}" for kind, count in dataclasses.asdict(launches).items())
    return f"{launches.total:,} launches: {parts}"


def phase_table(profile: MemoryProfile) -> str:
    """Peaks by phase, in GiB, as text for a terminal; with launches where they were counted."""
    peaks = {**profile.phases, "peak": profile.peak}
    rows = [[name, gib(peak.allocated), gib(peak.reserved), gib(peak.device)] for name, peak in peaks.items()]
    headers = [f"{profile.device} ({profile.provenance})", "allocated GiB", "reserved GiB", "with context GiB"]
    if profile.launches:
        headers.append("launches")
        for row in rows:
            row.append(f"{profile.launches[row[0]].total:,}" if row[0] in profile.launches else "")
    align = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
    return f"\n{table}\n(card: {gib(profile.total_bytes)} GiB)"


def usable_bytes(card: str) -> int | None:
    """What a job, its CUDA context included, can count on on that card; None for one that the table does not have."""
    try:
        return virtual_gpu.get_card(card).usable_bytes
    except virtual_gpu.VirtualGPUError:
        return None


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A GitHub table; the first `text_columns` columns are text, the rest figures."""
    align = ["left"] * text_columns + ["right"] * (len(headers) - text_columns)
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)


def markdown_page(title: str, parts: Sequence[str], record: dict[str, Any]) -> str:
    """A result for people: a heading, paragraphs and tables, and where the figures come from."""
    return "\n\n".join((f"# {title}", *parts, provenance_lines(record))) + "\n"


def provenance_lines(record: dict[str, Any]) -> str:
    """The origin of a table's figures, as a paragraph under it."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Figures are **{record['provenance']}** on `{record['device']}` (driver: {record['driver']}). "
        f"Versions: {packages}. Commit `{record['commit']}`, `{record['command']}`, {record['date']}."
    )


def write_rows(
    folder: Path,
    name: str,
    rows: Sequence[Any],
    record: dict[str, Any],
    *,
    title: str,
    parts: Sequence[str],
    head: Mapping[str, Any] | None = None,
) -> None:
    """Write rows, dataclasses or dicts: cases of the JSON, behind `head`, and lines of the CSV; `parts` is Markdown."""
    cases = [row if isinstance(row, dict) else plain_row(row) for row in rows]
    content = {"environment": record, **(head or {}), "cases": cases}
    write_result(folder, name, content, markdown_page(title, parts, record), cases)


def write_result(
    folder: Path, name: str, content: dict[str, Any], markdown: str, rows: Sequence[dict[str, Any]]
) -> None:
    """Write `name`.json (the source), `name`.md and `name`.csv into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for suffix, body in ((".json", json.dumps(content, indent=2) + "\n"), (".md", markdown), (".csv", text.getvalue())):
        write_whole(folder / f"{name}{suffix}", body)
