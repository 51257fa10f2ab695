"""From the baseline to lean, one idea a row: what is left of the peak, and what the idea took off."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.style import Axes, Figure, Style, doubling, save
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Column, gib, markdown_of, page_table, usable_bytes, write_rows
from qlora_lowmem.units import GIB


@dataclass(frozen=True)
class Step:
    """One idea more than the step before, in the recipe's words, and the peaks and the floor of the recipe with it."""

    idea: str
    peak_allocated_bytes: Count
    peak_device_bytes: Count
    floor_bytes: Count


_Row = tuple[Step, int | None]  # with what its idea saved; None for the first
_COLUMNS: tuple[Column[_Row], ...] = (
    Column("idea", lambda row: Cell(row[0].idea)),
    Column("allocated", lambda row: Cell.gib(row[0].peak_allocated_bytes)),
    Column(
        "saves",
        lambda row: Cell.gib(row[1] or 0),
        page_cell=lambda row: Cell("-") if row[1] is None else Cell.gib(row[1]),
    ),
    Column("on the card", lambda row: Cell.gib(row[0].peak_device_bytes)),
    Column("floor", lambda row: Cell.gib(row[0].floor_bytes)),
    Column("x floor", lambda row: Cell.times_floor(row[0].peak_allocated_bytes, row[0].floor_bytes)),
)


_TITLE = "From the baseline to lean"


def _rows(steps: Sequence[Step]) -> list[_Row]:
    peaks = [step.peak_allocated_bytes for step in steps]
    return list(zip(steps, [None, *(before - after for before, after in pairwise(peaks))], strict=True))


def write_waterfall(folder: Path, steps: Sequence[Step], record: dict[str, Any]) -> None:
    """Write `waterfall` under `folder` as JSON, Markdown, CSV, SVG and PNG."""
    rows = _rows(steps)
    text = (
        "Granite-4.0-H-1B, peaks in GiB, one idea more a row; a negative saving is what training more layers costs. "
        f"{FLOOR_TEXT}"
    )
    cases = [
        {
            "idea": step.idea,
            "peak_allocated_bytes": step.peak_allocated_bytes,
            "saves_bytes": saved or 0,
            "peak_device_bytes": step.peak_device_bytes,
            "floor_bytes": step.floor_bytes,
        }
        for step, saved in rows
    ]
    parts = (text, markdown_of(_COLUMNS, rows), "![waterfall](waterfall.svg)")
    head = {name: record[name] for name in ("device", "provenance")}
    write_rows(folder, "waterfall", cases, record, title=_TITLE, parts=parts, head=head)
    usable = usable_bytes(record["device"])
    save(lambda style: waterfall(style, steps, usable), _TITLE, folder / "waterfall.svg", folder / "waterfall.png")


def _read(content: Mapping[str, Any]) -> tuple[Step, ...]:
    steps = read_as(Cases[Step], content).cases
    for number, step in enumerate(steps):
        if not (step.peak_allocated_bytes and step.peak_device_bytes and step.floor_bytes):
            raise ValueError(f"cases[{number}] has a peak or a floor of 0 bytes")
    return steps


def _section(provenance: Provenance, steps: tuple[Step, ...]) -> Section:
    usable = usable_bytes(provenance.device)
    first, last = steps[0], steps[-1]
    times = first.peak_allocated_bytes / last.peak_allocated_bytes
    summary = (
        f"The allocated peak goes from {gib(first.peak_allocated_bytes)} GiB ({first.idea}) to "
        f"{gib(last.peak_allocated_bytes)} GiB ({last.idea}) in {len(steps) - 1} steps, {times:.1f} times less."
    )
    fitting = next((step for step in steps if usable and step.peak_device_bytes <= usable), None)
    if fitting and usable:
        summary += (
            f" With {fitting.idea} it holds {gib(fitting.peak_device_bytes)} GiB on the card, CUDA context included, "
            f"and fits into the {gib(usable)} GiB that a job can use there."
        )
    chart = Chart(
        "waterfall",
        "Peak after each idea",
        summary,
        lambda style: waterfall(style, steps, usable),
        (page_table("Peaks in GiB after each idea", _COLUMNS, _rows(steps)),),
    )
    peaks = " → ".join(f"{step.peak_allocated_bytes / GIB:.2f}" for step in (first, last))
    return Section(
        name="waterfall",
        title=_TITLE,
        text="One idea more a row. A bar's first part is what is left allocated at the peak, its second what the idea "
        f"saved. {FLOOR_TEXT} The ring is what the card holds, with the allocator's slack and the CUDA context.",
        charts=(chart,),
        highlights=((f"{peaks} GiB", f"allocated peak, from “{first.idea}” to “{last.idea}”"),),
    )


KIND = Kind("a waterfall (pytest bench/test_lean.py)", has_rows("cases", "idea"), _read, each_its_own(_section))


def waterfall(style: Style, steps: Sequence[Step], usable_bytes: int | None) -> Figure:
    """A bar a step on a logarithmic scale, and what a job can count on on the card, where that is known."""
    figure = style.figure(style.row_height * len(steps) + (1.75 if style.narrow else 1.2))
    axes = figure.subplots()
    places, height = style.name_rows(axes, [step.idea for step in steps])
    start = _scale(axes, style, steps)
    for place, row in zip(places, _rows(steps), strict=True):
        _draw(axes, style, place, height, row, start)
    axes.set_xlabel("peak, GiB, logarithmic scale")
    style.plain(axes, grid="x")
    ring = {"linestyle": "none", "marker": "o", "markerfacecolor": "paper", "markeredgecolor": "ink"}
    handles = [
        style.patch("allocated", color="bar"),
        style.patch("saved by this idea", color="saved"),
        style.patch("cost of this idea", color="bad"),
        style.stroke("floor", color="floor", linewidth=2.5),
        style.stroke("on the card, with context", **ring),
    ]
    if usable_bytes is not None:
        axes.axvline(usable_bytes / GIB, color=style.theme["limit"], linewidth=1.2, linestyle="--", zorder=0.9)
        text = f"usable on the card: {usable_bytes / GIB:.2f}"
        handles.append(style.stroke(text, color="limit", linestyle="--", linewidth=1.2))
    style.legend(figure, handles, 2 if style.narrow else 3, columnspacing=1.0)
    return figure


def _draw(axes: Axes, style: Style, place: float, height: float, row: _Row, start: float) -> None:
    step, saved = row
    peak, previous = step.peak_allocated_bytes / GIB, (step.peak_allocated_bytes + (saved or 0)) / GIB
    low, high = sorted((peak, previous))
    for left, right, role in ((start, low, "bar"), (low, high, "saved" if previous > peak else "bad")):
        axes.barh(place, right - left, left=left, height=height, color=style.theme[role], linewidth=0)
    style.tick(axes, step.floor_bytes / GIB, place, height / 2 + 0.04, "floor")
    ring = style.mark("o", "ink", "paper", 1.0)
    axes.plot(step.peak_device_bytes / GIB, place, markersize=5.5, linestyle="none", **ring)
    change = "" if saved is None else f" ({'−' if saved > 0 else '+'}{abs(saved) / GIB:.3f})"
    style.row_words(axes, f"{peak:.3f}{change}", max(high, step.peak_device_bytes / GIB), place, 7)


def _scale(axes: Axes, style: Style, steps: Sequence[Step]) -> float:
    """Ticks at powers of two, from one that leaves something of the shortest bar. Returns it, in GiB."""
    smallest = min(min(step.floor_bytes, step.peak_allocated_bytes) for step in steps)
    largest = max(max(step.peak_allocated_bytes, step.peak_device_bytes) for step in steps)
    low, high = math.floor(math.log2(smallest / GIB) - 0.2), math.ceil(math.log2(largest / GIB))
    doubling(axes, "x", low, high, max(1, (high - low) // 8))
    # Room for the figures behind the longest bar: a part of the scale's length.
    axes.set_xlim(2.0**low, 2.0 ** (high + (high - low) * (0.04 if style.narrow else 0.13)))
    return float(2.0**low)
