"""Predicted against measured: every peak on the line of equals, and how far off each is."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_lowmem.results.kinds.prediction_table import LIMITS, READINGS
from qlora_lowmem.results.kinds.prediction_table import Figure as Reading
from qlora_lowmem.results.style import SMALL, Style, name_rows, plain, row_height
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = {"allocated": ("o", "series-1"), "reserved": ("s", "series-3"), "device": ("D", "series-2")}


def prediction(style: Style, figures: Sequence[Reading]) -> "Figure":
    """Two panels, side by side or one above the other.

    Args:
        figures: readings of whole runs, at least one.
    """
    recipes = list(dict.fromkeys(figure.recipe for figure in figures))
    rows = row_height(style) * len(recipes)
    if style.narrow:
        figure = style.figure(rows + 5.2)
        scatter, errors = figure.subplots(2, 1, height_ratios=(3.2, rows + 0.9))
    else:
        figure = style.figure(max(rows + 1.4, 4.0))
        scatter, errors = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _scatter(scatter, style, figures)
    _errors(errors, style, figures, recipes)
    _legend(figure, style)
    return figure


def _scatter(axes: "Axes", style: Style, figures: Sequence[Reading]) -> None:
    equals(axes, style, [size / GIB for figure in figures for size in (figure.predicted, figure.measured)])
    for figure in figures:
        marker, role = _MARKS[figure.reading]
        axes.plot(
            figure.measured / GIB,
            figure.predicted / GIB,
            marker=marker,
            markersize=6,
            markerfacecolor="none",
            markeredgecolor=style.theme[role],
            markeredgewidth=1.4,
        )
    axes.set_xlabel("measured GiB")
    axes.set_ylabel("predicted GiB")


def equals(axes: "Axes", style: Style, sizes: Sequence[float]) -> None:
    """Two logarithmic scales, each with room for all sizes in GiB, and the line on which both are equal."""
    found = [size for size in sizes if size]
    low, high = math.floor(math.log2(min(found))), math.ceil(math.log2(max(found)))
    high = max(high, low + 1)
    ends = (2.0**low, 2.0**high)
    axes.plot(ends, ends, color=style.theme["edge"], linewidth=1, linestyle="--")
    ticks = [2.0**power for power in range(low, high + 1)]
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log", base=2)
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_box_aspect(0.8 if style.narrow else 1)
    muted = style.theme["muted"]
    axes.text(0.97, 0.05, "dashed: equal", transform=axes.transAxes, ha="right", fontsize=SMALL, color=muted)
    plain(axes, style, keep=("bottom", "left"), grid="y")


def _errors(axes: "Axes", style: Style, figures: Sequence[Reading], recipes: Sequence[str]) -> None:
    places, _ = name_rows(axes, recipes, style)
    place_of = dict(zip(recipes, places, strict=True))
    for limit in set(LIMITS.values()):
        for side in (-limit, limit):
            axes.axvline(side, color=style.theme["limit"], linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(0, color=style.theme["edge"], linewidth=1)
    for figure in figures:
        marker, role = _MARKS[figure.reading]
        axes.plot(
            100 * figure.error,
            place_of[figure.recipe],
            marker=marker,
            markersize=6,
            markerfacecolor="none",
            markeredgecolor=style.theme[role],
            markeredgewidth=1.4,
        )
    reach = max(*LIMITS.values(), *(abs(100 * figure.error) for figure in figures)) * 1.15
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("predicted over measured, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    plain(axes, style)


def _legend(figure: "Figure", style: Style) -> None:
    from matplotlib.lines import Line2D

    names = {"allocated": "allocated", "reserved": "reserved", "device": "on the card"}
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=_MARKS[reading][0],
            markerfacecolor="none",
            markeredgecolor=style.theme[_MARKS[reading][1]],
            markeredgewidth=1.4,
            label=names[reading],
        )
        for reading in READINGS
    ]
    limits = ", ".join(f"{names[reading]} {limit} %" for reading, limit in LIMITS.items())
    colour = style.theme["limit"]
    handles.append(Line2D([], [], color=colour, linestyle=(0, (4, 3)), linewidth=1, label=f"limits: {limits}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if style.narrow else 4, frameon=False)
