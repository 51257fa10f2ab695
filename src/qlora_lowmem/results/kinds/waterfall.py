"""From the baseline to lean, one idea a row: what is left of the peak, and what the idea took off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lowmem.results.style import Style, name_rows, plain, row_height, words_behind
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Step:
    """One idea more than the step before.

    Attributes:
        idea: what changed, in the recipe's words.
        peak_allocated_bytes, peak_device_bytes, floor_bytes: of the recipe with it.
    """

    idea: str
    peak_allocated_bytes: int
    peak_device_bytes: int
    floor_bytes: int


def waterfall(style: Style, steps: Sequence[Step], usable_bytes: int | None) -> "Figure":
    """A bar a step on a logarithmic scale.

    Args:
        usable_bytes: what a job can count on on the card; None where that is not known.
    """
    figure = style.figure(row_height(style) * len(steps) + (1.75 if style.narrow else 1.2))
    axes = figure.subplots()
    places, height = name_rows(axes, [step.idea for step in steps], style)
    start = _scale(axes, style, steps)
    before = 0
    for place, step in zip(places, steps, strict=True):
        _row(axes, style, place, height, step, before, start)
        before = step.peak_allocated_bytes
    if usable_bytes is not None:
        axes.axvline(usable_bytes / GIB, color=style.theme["limit"], linewidth=1.2, linestyle="--", zorder=0.9)
    axes.set_xlabel("peak, GiB, logarithmic scale")
    plain(axes, style, grid="x")
    _legend(figure, style, usable_bytes)
    return figure


def _row(axes: "Axes", style: Style, place: float, height: float, step: Step, before: int, start: float) -> None:
    colours, peak = style.theme, step.peak_allocated_bytes / GIB
    previous = before / GIB if before else peak
    low, high = sorted((peak, previous))
    axes.barh(place, low - start, left=start, height=height, color=colours["bar"], linewidth=0)
    change = colours["saved"] if previous > peak else colours["bad"]
    axes.barh(place, high - low, left=low, height=height, color=change, linewidth=0)
    half = height / 2 + 0.04
    axes.plot([step.floor_bytes / GIB] * 2, [place - half, place + half], color=colours["floor"], linewidth=2.5)
    axes.plot(
        step.peak_device_bytes / GIB,
        place,
        marker="o",
        markersize=5.5,
        markerfacecolor=colours["paper"],
        markeredgecolor=colours["ink"],
        linestyle="none",
    )
    words = f"{peak:.3f}"
    if before:
        words += f" ({'−' if peak < previous else '+'}{abs(peak - previous):.3f})"
    if style.narrow:  # beside the name, for behind the bar is no room
        place_of_name = {"xycoords": ("axes fraction", "data"), "ha": "right"}
        words_behind(axes, words, 1, place - 0.42, 0, **place_of_name)
    else:
        words_behind(axes, words, max(high, step.peak_device_bytes / GIB), place, 7)


def _scale(axes: "Axes", style: Style, steps: Sequence[Step]) -> float:
    """Ticks at powers of two, from one that leaves something of the shortest bar. Returns it, in GiB."""
    smallest = min(count for step in steps for count in (step.floor_bytes, step.peak_allocated_bytes))
    largest = max(count for step in steps for count in (step.peak_allocated_bytes, step.peak_device_bytes))
    low, high = math.floor(math.log2(smallest / GIB) - 0.2), math.ceil(math.log2(largest / GIB))
    axes.set_xscale("log", base=2)
    # Room for the figures behind the longest bar: a part of the scale's length.
    axes.set_xlim(2.0**low, 2.0 ** (high + (high - low) * (0.04 if style.narrow else 0.13)))
    ticks = [2.0**power for power in range(low, high + 1, max(1, (high - low) // 8))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return float(2.0**low)


def _legend(figure: "Figure", style: Style, usable_bytes: int | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = style.theme
    handles: list[Patch | Line2D] = [
        Patch(color=colours["bar"], label="allocated"),
        Patch(color=colours["saved"], label="saved by this idea"),
        Patch(color=colours["bad"], label="cost of this idea"),
        Line2D([], [], color=colours["floor"], linewidth=2.5, label="floor"),
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            markerfacecolor=colours["paper"],
            markeredgecolor=colours["ink"],
            label="on the card, with context",
        ),
    ]
    if usable_bytes is not None:
        text = f"usable on the card: {usable_bytes / GIB:.2f}"
        handles.append(Line2D([], [], color=colours["limit"], linestyle="--", linewidth=1.2, label=text))
    columns = 2 if style.narrow else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.0)
