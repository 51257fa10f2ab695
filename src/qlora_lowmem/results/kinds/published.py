"""What others measured against what the plan says: every figure on the line of equals, and how far off each is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lowmem.results.kinds.prediction import equals
from qlora_lowmem.results.style import Style, name_at, plain, row_height, short
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Figure -> what people read, its mark, the role of its colour. A limit is the memory on which a length was the longest.
FIGURES = {
    "allocated": ("allocated", "o", "series-1"),
    "reserved": ("reserved", "s", "series-3"),
    "device": ("on the card", "D", "series-2"),
    "limit": ("longest on that memory", "^", "series-4"),
}


@dataclass(frozen=True)
class Published:
    """One figure that others measured, and the plan's, in bytes.

    Attributes:
        source: who published it.
        figure: a key of `FIGURES`.
        explained: what the measured program holds and a recipe's run does not.
    """

    source: str
    figure: str
    measured: int
    planned: int
    explained: int

    @property
    def error(self) -> float:
        """Planned over measured, less 1."""
        return self.planned / self.measured - 1

    @property
    def left(self) -> float:
        """The same with the explained bytes added to the plan."""
        return (self.planned + self.explained) / self.measured - 1


def published(style: Style, points: Sequence[Published]) -> "Figure":
    """Two panels, side by side or one above the other; hollow is the plan, filled the plan with what is explained.

    Args:
        points: at least one.
    """
    sources = list(dict.fromkeys(point.source for point in points))
    rows = 1.2 * row_height(style) * sum(_tall(points, source) for source in sources)
    if style.narrow:
        figure = style.figure(rows + 5.6)
        scatter, errors = figure.subplots(2, 1, height_ratios=(3.2, rows + 0.9))
    else:
        figure = style.figure(max(rows + 1.6, 4.2))
        scatter, errors = figure.subplots(1, 2, width_ratios=(1, 1.15))
    equals(scatter, style, [size / GIB for point in points for size in (point.planned, point.measured)])
    scatter.set_xlabel("measured by others, GiB")
    scatter.set_ylabel("predicted GiB")
    for point in points:
        x, y, explained = (size / GIB for size in (point.measured, point.planned, point.planned + point.explained))
        colour = style.theme[FIGURES[point.figure][2]]
        scatter.plot([x, x], [y, explained], color=colour, linewidth=1)
        _mark(scatter, style, point, x, y, filled=False)
        if point.explained:
            _mark(scatter, style, point, x, explained, filled=True)
    _errors(errors, style, points, sources)
    _legend(figure, style, points)
    return figure


def _mark(axes: "Axes", style: Style, point: Published, x: float, y: float, filled: bool) -> None:
    _, marker, role = FIGURES[point.figure]
    colour = style.theme[role]
    axes.plot(
        x,
        y,
        marker=marker,
        markersize=4 if filled else 5.5,
        markerfacecolor=colour if filled else "none",
        markeredgecolor=colour,
        markeredgewidth=1.2,
    )


def _errors(axes: "Axes", style: Style, points: Sequence[Published], sources: Sequence[str]) -> None:
    axes.axvline(0, color=style.theme["edge"], linewidth=1, linestyle="--")
    top, middles = 0.0, []
    for source in sources:
        found = [point for point in points if point.source == source]
        tall = _tall(points, source)
        if style.narrow:
            name_at(axes, style, source, top + 0.14)
        first, last = top + (0.42 if style.narrow else 0.15), top + tall - 0.15
        middles.append((first + last) / 2)
        top += tall
        for number, point in enumerate(found):  # one below the other, in the file's order
            y = first + (last - first) * (number + 0.5) / len(found)
            if point.explained:
                ends = [100 * point.error, 100 * point.left]
                axes.plot(ends, [y, y], color=style.theme["grid"], linewidth=0.8, zorder=1)
                _mark(axes, style, point, 100 * point.left, y, filled=True)
            _mark(axes, style, point, 100 * point.error, y, filled=False)
    axes.set_ylim(top, -0.1)
    axes.set_yticks([] if style.narrow else middles, [] if style.narrow else [short(source) for source in sources])
    axes.tick_params(axis="y", length=0, labelsize=9)
    errors = [0.0, *(100 * error for point in points for error in (point.error, point.left))]
    room = 0.06 * (max(errors) - min(errors)) + 0.5
    axes.set_xlim(min(errors) - room, max(errors) + room)
    axes.set_xlabel("predicted over measured, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.locator_params(axis="x", nbins=6)
    plain(axes, style, grid="x")


def _tall(points: Sequence[Published], source: str) -> float:
    """How many rows a source takes: an eighth of one for each of its figures, one at least."""
    return max(1.0, sum(point.source == source for point in points) / 8)


def _legend(figure: "Figure", style: Style, points: Sequence[Published]) -> None:
    from matplotlib.lines import Line2D

    there = {point.figure for point in points}
    handles = []
    for name, (text, marker, role) in FIGURES.items():
        if name in there:
            colour = style.theme[role]
            handles.append(
                Line2D([], [], linestyle="none", marker=marker, color=colour, markerfacecolor="none", label=text)
            )
    if any(point.explained for point in points):
        colour = style.theme["ink"]
        handles.append(
            Line2D([], [], linestyle="none", marker="o", color=colour, label="filled: with what is explained")
        )
    columns = 2 if style.narrow else len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2)
