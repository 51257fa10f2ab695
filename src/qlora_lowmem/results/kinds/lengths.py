"""What the card must hold against the length of a sequence, and what it has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.style import Axes, Figure, Style, doubling, legend_label
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Column, gib, markdown_of, page_table, write_rows
from qlora_lowmem.results.theme import SERIES
from qlora_lowmem.units import GIB

_MARKERS = ("o", "s", "D", "^", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1)), (0, (8, 3)))
_LOGARITHMIC_FROM = 6  # where the largest is that many times the smallest


@dataclass(frozen=True)
class Length:
    """A recipe's peaks at one sequence length, in bytes; 0 where one is not known.

    Attributes:
        fits: what the device held, against the card's usable memory.
        floor_bytes: what no method avoids at that length (`memory.owners`).
    """

    recipe: str
    tokens: Count
    fits: bool
    peak: Peak
    floor_bytes: Count


_COLUMNS: tuple[Column[Length], ...] = (
    Column("recipe", lambda row: Cell(row.recipe)),
    Column("tokens", lambda row: Cell.count(row.tokens)),
    Column("allocated GiB", lambda row: Cell.known_gib(row.peak.allocated), "allocated"),
    Column("floor GiB", lambda row: Cell.gib(row.floor_bytes), "floor"),
    Column("x floor", lambda row: Cell.times_floor(row.peak.allocated, row.floor_bytes)),
    Column("reserved GiB", lambda row: Cell.known_gib(row.peak.reserved), "reserved"),
    Column("on the card GiB", lambda row: Cell.known_gib(row.peak.device), "on the card"),
    Column(
        "fits",
        lambda row: Cell("yes" if row.fits else "no"),
        "verdict",
        lambda row: Cell("fits", tone="good") if row.fits else Cell("does not fit", tone="bad"),
    ),
)


def lengths_table(rows: Sequence[Length]) -> str:
    """The rows as a Markdown table."""
    return markdown_of(_COLUMNS, rows)


def write_lengths(
    folder: Path, rows: Sequence[Length], card: virtual_gpu.Card, seconds: float, record: dict[str, Any]
) -> None:
    """Write `lengths` as JSON, Markdown and CSV; `seconds` is what all runs took."""
    text = (
        f"{len(rows)} runs in {seconds:.1f} s, imports included. The card has {gib(card.usable_bytes)} GiB usable, the "
        f"CUDA context in it; what needs more ran on a card of the same kind with room for it. {FLOOR_TEXT}"
    )
    title, table = f"Memory against sequence length on {card.name}", lengths_table(rows)
    head = {"device": card.name, "provenance": "virtual", "usable_bytes": card.usable_bytes}
    write_rows(folder, "lengths", rows, record, title=title, parts=(text, table), head=head)


@dataclass(frozen=True)
class _File(Cases[Length]):
    device: str
    usable_bytes: Count


def _read(content: Mapping[str, Any]) -> _File:
    file = read_as(_File, content)
    if not file.usable_bytes or not all(row.tokens and row.floor_bytes for row in file.cases):
        raise ValueError("usable_bytes, or a case's tokens or floor, is 0")
    return file


def _section(_provenance: Provenance, file: _File) -> Section:
    chart = Chart(
        "lengths",
        "Memory against sequence length",
        f"{gib(file.usable_bytes)} GiB can be used on {file.device}. {_longest(file.cases)}",
        lambda style: lengths(style, file.cases, file.usable_bytes),
        (page_table("Peaks in GiB by recipe and length", _COLUMNS, file.cases),),
    )
    return Section(
        name="lengths",
        title="How long a sequence may be",
        text="What the card must hold at the peak, CUDA context included, for one sequence of that many tokens. The "
        f"dashed line is what a job can use on this card. {FLOOR_TEXT}",
        charts=(chart,),
    )


def _longest(rows: Sequence[Length]) -> str:
    parts = []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        fitting = [row.tokens for row in rows if row.recipe == recipe and row.fits]
        parts.append(f"{recipe} {max(fitting):,} tokens" if fitting else f"{recipe} at none of them")
    return f"The longest of these lengths that fits: {', '.join(parts)}."


def _recognises(content: Mapping[str, Any]) -> bool:
    return "usable_bytes" in content and isinstance(content.get("cases"), list)


KIND = Kind("peaks by length (lengths --table)", _recognises, _read, each_its_own(_section))


def lengths(style: Style, points: Sequence[Length], usable_bytes: int) -> Figure:
    """A line a recipe, a thin one its floor; filled marks fit, hollow do not, a cross is where the need is unknown."""
    figure = style.figure(4.6 if style.narrow else 4.4)
    axes = figure.subplots()
    recipes = list(dict.fromkeys(point.recipe for point in points))
    for number, recipe in enumerate(recipes):
        found = sorted((point for point in points if point.recipe == recipe), key=lambda point: point.tokens)
        _line(axes, style, number, found, usable_bytes)
    axes.axhline(usable_bytes / GIB, color=style.theme["limit"], linewidth=1.4, linestyle="--")
    _scales(axes, style, points, usable_bytes)
    axes.set_xlabel("tokens of a sequence" if style.narrow else "tokens of a sequence, doubled at each line")
    axes.set_ylabel("GiB on the card at the peak")
    style.plain(axes, keep=("bottom", "left"), grid="y")
    _legend(figure, style, recipes, points, usable_bytes)
    return figure


def _line(axes: Axes, style: Style, number: int, found: Sequence[Length], usable_bytes: int) -> None:
    look = style.look(**_look(number))
    colour, marker = look["color"], look.pop("marker")
    known = [point for point in found if point.peak.device]
    needs = [point.peak.device / GIB for point in known]
    axes.plot([point.tokens for point in known], needs, linewidth=1.8, **look)
    floors = [point.floor_bytes / GIB for point in found]
    axes.plot([point.tokens for point in found], floors, color=colour, linewidth=0.8)
    for point in found:
        mark = style.mark(marker if point.peak.device else "x", colour, colour if point.fits else "paper")
        axes.plot(point.tokens, (point.peak.device or usable_bytes) / GIB, markersize=6, zorder=4, **mark)


def _scales(axes: Axes, style: Style, points: Sequence[Length], usable_bytes: int) -> None:
    tokens = sorted({point.tokens for point in points})
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(tokens[0])), math.ceil(math.log2(tokens[-1]))
    ticks = range(low, high + 1, max(1, (high - low) // (4 if style.narrow else 9)))
    axes.set_xticks([2.0**power for power in ticks], [_tokens(2**power) for power in ticks])
    axes.set_xlim(2 ** (low - 0.3), 2 ** (high + 0.3))
    known = [point.peak.device for point in points if point.peak.device]
    needs = [usable_bytes, *known, *(point.floor_bytes for point in points)]
    if max(needs) < _LOGARITHMIC_FROM * min(needs):
        axes.set_ylim(0, max(needs) / GIB * 1.12)
    else:
        bottom, top = math.floor(math.log2(min(needs) / GIB)), math.ceil(math.log2(max(needs) / GIB))
        doubling(axes, "y", bottom, top)
        axes.set_ylim(2.0**bottom, 2.0 ** (top + 0.1))
    axes.minorticks_off()


def _tokens(count: int) -> str:
    """`2k` for 2048, as lengths are spoken of."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def _legend(figure: Figure, style: Style, recipes: Sequence[str], points: Sequence[Length], usable_bytes: int) -> None:
    handles = [style.stroke(legend_label(recipe), **_look(number)) for number, recipe in enumerate(recipes)]
    mark = {"linestyle": "none", "markeredgecolor": "ink", "markerfacecolor": "paper"}
    if any(not point.fits and point.peak.device for point in points):
        handles.append(style.stroke("hollow: does not fit", marker="o", **mark))
    if any(not point.peak.device for point in points):
        handles.append(style.stroke("does not fit, need not known", marker="x", **mark))
    handles.append(style.stroke("thin: the floor", color="ink", linewidth=0.8))
    text = f"usable on the card: {usable_bytes / GIB:.2f}"
    handles.append(style.stroke(text, color="limit", linewidth=1.4, linestyle="--"))
    style.legend(figure, handles, 2 if style.narrow else 4)


def _look(number: int) -> dict[str, Any]:
    """Colour, mark and dashes of a recipe, so that one is enough to tell it by."""
    found = {"color": SERIES, "marker": _MARKERS, "linestyle": _DASHES}
    return {name: choices[number % len(choices)] for name, choices in found.items()}
