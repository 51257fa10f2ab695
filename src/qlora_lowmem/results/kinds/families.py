"""Lean beside the optimised recipe, model by model: what each peaks at, and the floor under both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lowmem.results.style import Style, name_rows, plain, row_height, words_behind
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Pair:
    """Allocated peaks of both recipes with one model at one length, in bytes.

    Attributes:
        optimised, lean: the recipes' peaks; the first is above the floor.
        floor: of both.
    """

    model: str
    tokens: int
    optimised: int
    lean: int
    floor: int

    @property
    def saves(self) -> int:
        """What lean's peak is less than the optimised recipe's."""
        return self.optimised - self.lean

    @property
    def share(self) -> float:
        """That, of what the optimised recipe has above the floor."""
        return self.saves / (self.optimised - self.floor)


def families(style: Style, lengths: Sequence[Sequence[Pair]]) -> "Figure":
    """A panel a length, one above the other on one scale; a bar a model.

    Args:
        lengths: the pairs of each length; at least one length, each with at least one pair.
    """
    rows = [row_height(style) * len(pairs) for pairs in lengths]
    figure = style.figure(sum(rows) + 0.3 * len(rows) + (1.2 if style.narrow else 0.8))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for panel, pairs in zip(panels, lengths, strict=True):
        panel.set_title(f"{pairs[0].tokens:,} tokens", loc="left", fontsize=9, fontweight="bold")
        places, height = name_rows(panel, [pair.model for pair in pairs], style)
        for place, pair in zip(places, pairs, strict=True):
            _row(panel, style, place, height, pair)
        plain(panel, style, grid="x")
    largest = max(_end(pair) for pairs in lengths for pair in pairs)
    panels[-1].set_xlim(0, largest * (1.04 if style.narrow else 1.2))
    panels[-1].set_xlabel("peak allocated, GiB")
    _legend(figure, style)
    return figure


def _row(axes: "Axes", style: Style, place: float, height: float, pair: Pair) -> None:
    for size, role in ((pair.optimised, "saved"), (pair.lean, "bar")):  # the second covers a part of the first
        axes.barh(place, size / GIB, height=height, color=style.theme[role], linewidth=0)
    mark, half = pair.floor / GIB, height / 2 + 0.04
    axes.plot([mark, mark], [place - half, place + half], color=style.theme["floor"], linewidth=2.5)
    words = f"{pair.lean / GIB:.3f} ({-pair.saves / GIB:+.3f})".replace("-", "−")
    if style.narrow:  # beside the name, for behind the bar is no room
        words_behind(axes, words, 1, place - 0.42, 0, xycoords=("axes fraction", "data"), ha="right")
    else:
        words_behind(axes, words, _end(pair), place)


def _end(pair: Pair) -> float:
    """Where its bar ends, in GiB."""
    return max(pair.optimised, pair.lean) / GIB


def _legend(figure: "Figure", style: Style) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = style.theme
    handles = [
        Patch(color=colours["bar"], label="lean"),
        Patch(color=colours["saved"], label="saved against optimised"),
        Line2D([], [], color=colours["floor"], linewidth=2.5, label="floor"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, columnspacing=1.0)
