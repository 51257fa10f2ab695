"""What the card must hold against the length of a sequence, and what it has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.style import SERIES, Axes, Figure, Style, doubling, legend_label
from qlora_lowmem.results.subject import subject
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    SHORTENED_TEXT,
    Cell,
    Column,
    gib,
    launches_column,
    markdown_of,
    page_table,
    write_rows,
)
from qlora_lowmem.units import GIB

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1)), (0, (8, 3)))
# Colour, mark and dashes of a recipe, so that one is enough to tell it by.
_LOOKS = [{"color": c, "marker": m, "linestyle": d} for c, m, d in zip(SERIES, "osD^vP", _DASHES, strict=True)]
_LOGARITHMIC_FROM = 6  # where the largest is that many times the smallest


@dataclass(frozen=True)
class Length:
    """A recipe's peaks at one sequence length, in bytes; 0 where one is not known.

    Attributes:
        fits: what the device held, against the card's usable memory.
        floor_bytes: what no method avoids at that length (`memory.owners`).
        launches: kernels, copies and memsets of a micro-batch; None where nobody counted.
    """

    recipe: str
    tokens: Count
    fits: bool
    peak: Peak
    floor_bytes: Count
    launches: Count | None = None


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
    launches_column("launches a micro-batch", lambda row: row.launches),
)


def lengths_table(rows: Sequence[Length]) -> str:
    """The rows as a Markdown table."""
    return markdown_of(_COLUMNS, rows)


def write_lengths(
    folder: Path, model: str, rows: Sequence[Length], card: virtual_gpu.Card, seconds: float, record: dict[str, Any]
) -> None:
    """Write `lengths` as JSON, Markdown and CSV; `seconds` is what all runs took."""
    text = (
        f"{model}, {len(rows)} runs in {seconds:.1f} s, imports included. The card has {gib(card.usable_bytes)} GiB "
        "usable, the CUDA context in it; what needs more ran on a card of the same kind with room for it. "
        f"{SHORTENED_TEXT} {FLOOR_TEXT}"
    )
    title, parts = f"Memory against sequence length on {card.name}", (text, lengths_table(rows))
    head = {"device": card.name, "provenance": "virtual", "model": model, "usable_bytes": card.usable_bytes}
    write_rows(folder, "lengths", rows, record, title=title, parts=parts, head=head)


@dataclass(frozen=True)
class _File(Cases[Length]):
    device: str
    usable_bytes: Count
    model: str = ""


def _read(content: Mapping[str, Any]) -> _File:
    file = read_as(_File, content)
    if not file.usable_bytes or not all(row.tokens and row.floor_bytes for row in file.cases):
        raise ValueError("usable_bytes, or a case's tokens or floor, is 0")
    return file


def _section(provenance: Provenance, file: _File) -> Section:
    longest = []
    for recipe, found in _by_recipe(file.cases).items():
        fitting = [row.tokens for row in found if row.fits]
        longest.append(f"{recipe} {fitting[-1]:,} tokens" if fitting else f"{recipe} at none of them")
    chart = Chart(
        "lengths",
        "Memory against sequence length",
        subject(file.model, on=provenance.where),
        f"{gib(file.usable_bytes)} GiB can be used on {file.device}. The longest of these lengths that fits: "
        f"{', '.join(longest)}.",
        lambda style: lengths(style, file.cases, file.usable_bytes),
        (page_table("Peaks in GiB by recipe and length", _COLUMNS, file.cases),),
    )
    return Section(
        name="lengths",
        title="How long a sequence may be",
        text="What the card must hold at the peak, CUDA context included, for one sequence of that many tokens. The "
        f"dashed line is what a job can use on this card. {SHORTENED_TEXT} {FLOOR_TEXT}",
        charts=(chart,),
        model=file.model,
    )


def _by_recipe(rows: Sequence[Length]) -> dict[str, list[Length]]:
    """By length."""
    in_order = sorted(rows, key=lambda row: row.tokens)
    return {name: [row for row in in_order if row.recipe == name] for name in dict.fromkeys(row.recipe for row in rows)}


KIND = Kind(
    "peaks by length (lengths --table)",
    lambda content: "usable_bytes" in content and isinstance(content.get("cases"), list),
    _read,
    each_its_own(_section),
)


def lengths(style: Style, points: Sequence[Length], usable_bytes: int) -> Figure:
    """A line a recipe, a thin one its floor; filled marks fit, hollow do not, a cross is where the need is unknown."""
    figure = style.figure(4.6 if style.narrow else 4.4)
    axes = figure.subplots()
    by_recipe = _by_recipe(points)
    for look, found in zip(cycle(_LOOKS), by_recipe.values(), strict=False):
        _line(axes, style, look, found, usable_bytes)
    axes.axhline(usable_bytes / GIB, color=style.theme["limit"], linewidth=1.4, linestyle="--")
    _scales(axes, style, points, usable_bytes)
    axes.set_xlabel("tokens of a sequence" if style.narrow else "tokens of a sequence, doubled at each line")
    axes.set_ylabel("GiB on the card at the peak")
    style.plain(axes, keep=("bottom", "left"), grid="y")
    handles = [
        style.stroke(legend_label(recipe), **look) for look, recipe in zip(cycle(_LOOKS), by_recipe, strict=False)
    ]
    mark = {"linestyle": "none", "markeredgecolor": "ink", "markerfacecolor": "paper"}
    if any(not point.fits and point.peak.device for point in points):
        handles.append(style.stroke("hollow: does not fit", marker="o", **mark))
    if any(not point.peak.device for point in points):
        handles.append(style.stroke("does not fit, need not known", marker="x", **mark))
    handles.append(style.stroke("thin: the floor", color="ink", linewidth=0.8))
    text = f"usable on the card: {usable_bytes / GIB:.2f}"
    handles.append(style.stroke(text, color="limit", linewidth=1.4, linestyle="--"))
    style.legend(figure, handles, 2 if style.narrow else 4)
    return figure


def _line(axes: Axes, style: Style, look: dict[str, Any], found: Sequence[Length], usable_bytes: int) -> None:
    look = style.look(**look)
    colour, marker = look["color"], look.pop("marker")
    known = [point for point in found if point.peak.device]
    axes.plot([each.tokens for each in known], [each.peak.device / GIB for each in known], linewidth=1.8, **look)
    floors = [each.floor_bytes / GIB for each in found]
    axes.plot([each.tokens for each in found], floors, color=colour, linewidth=0.8)
    for point in found:
        mark = style.mark(marker if point.peak.device else "x", colour, colour if point.fits else "paper")
        axes.plot(point.tokens, (point.peak.device or usable_bytes) / GIB, markersize=6, zorder=4, **mark)


def _scales(axes: Axes, style: Style, points: Sequence[Length], usable_bytes: int) -> None:
    axes.set_xscale("log", base=2)
    tokens = [point.tokens for point in points]
    low, high = math.floor(math.log2(min(tokens))), math.ceil(math.log2(max(tokens)))
    ticks = [2**power for power in range(low, high + 1, max(1, (high - low) // (4 if style.narrow else 9)))]
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
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
