"""What a page is made of: sections with charts and tables, and where their figures come from. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_lowmem.results.style import Drawing
from qlora_lowmem.results.tables import gib, times_floor
from qlora_lowmem.units import format_bytes


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


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: what it holds, with the unit of its figures.
        headers: of the columns.
        rows: as many cells each as there are headers.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def figures(self) -> frozenset[int]:
        """The columns, from 0, that hold figures."""
        return frozenset(
            column for column in range(len(self.headers)) if any(row[column].value is not None for row in self.rows)
        )


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands for it where it cannot be seen.

    Attributes:
        name: of its files and its place in the page: small letters, digits and hyphens.
        title: what it shows, short.
        summary: what it says, in a sentence or two.
        draw: draws it.
        tables: its figures, all of them.
    """

    name: str
    title: str
    summary: str
    draw: Drawing
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Provenance:
    """Where the figures of a file come from (`environment.provenance_record`); empty where the file does not say."""

    provenance: str
    device: str
    driver: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class Source:
    """A file that a section was made of."""

    file: str
    provenance: Provenance


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its place in the page: small letters, digits and hyphens.
        title: its heading.
        text: what one needs to know to read it.
        sources: what it was made of.
        charts: in their order.
        tables: those that stand beside no chart.
        highlights: (figure, what it is) for the head of the page.
        quoted: the figures in it that others measured and whose they are; empty where there are none.
    """

    name: str
    title: str
    text: str
    sources: tuple[Source, ...]
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    highlights: tuple[tuple[str, str], ...] = ()
    quoted: str = ""


def gib_cell(count: int, tone: str = "") -> Cell:
    """Bytes as GiB, for a column that names the unit."""
    return Cell(gib(count), count, tone)


def known_gib_cell(count: int) -> Cell:
    """The same, with a dash for 0, which stands for not known."""
    return gib_cell(count) if count else Cell("-")


def ratio_cell(text: str, value: float, tone: str = "") -> Cell:
    """A figure without a unit of its own, to six digits for machines."""
    return Cell(text, float(f"{value:.6g}"), tone)


def times_floor_cell(allocated_bytes: int, floor_bytes: int) -> Cell:
    """An allocated peak as a multiple of its floor, with a dash where either is not known."""
    text = times_floor(allocated_bytes, floor_bytes)
    return Cell(text) if text == "-" else ratio_cell(text, allocated_bytes / floor_bytes)


def size_cell(count: int) -> Cell:
    """Bytes with a unit that suits them."""
    return Cell(format_bytes(count), count)


def count_cell(count: int) -> Cell:
    """A number of things."""
    return Cell(f"{count:,}", count)


def words(*texts: str) -> tuple[Cell, ...]:
    """Cells of words."""
    return tuple(Cell(text) for text in texts)
