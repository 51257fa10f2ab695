"""How charts look: two widths, one font size a purpose, colours by role; and how a drawing becomes files."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_lowmem.results.svg import tidy
from qlora_lowmem.results.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL = 8.5  # points; no text is smaller than that
_DPI = 150


@dataclass(frozen=True)
class Style:
    """A theme and a width.

    Attributes:
        narrow: for a phone, 3.7 inches; else 8.6 inches. Both are about what the page shows at, so that a point of text
            stays one.
    """

    theme: Theme = LIGHT
    narrow: bool = False

    @property
    def width(self) -> float:
        """In inches."""
        return 3.7 if self.narrow else 8.6

    def figure(self, height: float) -> "Figure":
        """An empty figure of that many inches in height."""
        from matplotlib.figure import Figure

        return Figure(figsize=(self.width, height), layout="constrained", facecolor=self.theme["paper"])


Drawing = Callable[[Style], "Figure"]


@contextmanager
def drawing(style: Style) -> Iterator[None]:
    """matplotlib's settings for a figure, from its first artist to its file: the same data, the same bytes."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    ink = style.theme["ink"]
    settings: Any = {  # the type of its keys is a list of all of them
        "axes.edgecolor": style.theme["edge"],
        "axes.facecolor": "none",
        "axes.labelcolor": ink,
        "axes.labelsize": 9,
        "axes.prop_cycle": cycler(color=[ink]),  # what has no colour of its own
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "hatch.color": style.theme["edge"],
        "hatch.linewidth": 0.6,
        "legend.fontsize": SMALL,
        "legend.labelcolor": ink,
        "lines.color": ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "qlora_lowmem",
        "text.color": ink,
        "text.parse_math": False,  # names are names, dollars in them included
        "xtick.color": style.theme["edge"],
        "xtick.labelcolor": ink,
        "xtick.labelsize": SMALL,
        "xtick.major.size": 3,
        "ytick.color": style.theme["edge"],
        "ytick.labelcolor": ink,
        "ytick.labelsize": SMALL,
        "ytick.major.size": 3,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A reader's browser has the characters that the font of the drawing lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg_text(draw: Drawing, style: Style) -> str:
    """The drawing as an SVG document, as matplotlib writes it."""
    from io import StringIO

    text = StringIO()
    with drawing(style):
        draw(style).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(draw: Drawing, title: str, *paths: Path) -> None:
    """Write the drawing, wide and on white; the paths' suffixes (.svg, .png) say the formats."""
    style = Style()
    for path in paths:
        if path.suffix == ".svg":
            path.write_text(tidy(svg_text(draw, style), title), encoding="utf-8")
        else:
            with drawing(style):
                draw(style).savefig(path, dpi=_DPI)


def short(text: str, limit: int = 36) -> str:
    """A name that leaves room for the chart."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def plain(axes: "Axes", style: Style, *, keep: Sequence[str] = ("bottom",), grid: Literal["x", "y", ""] = "") -> None:
    """Only the spines that carry ticks, and a quiet grid along `grid` (`x`, `y` or none)."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side in keep)
    if grid:
        axes.grid(axis=grid, color=style.theme["grid"], linewidth=0.8)
        axes.set_axisbelow(True)


def name_rows(axes: "Axes", names: Sequence[str], style: Style) -> tuple[list[float], float]:
    """Name the rows of a horizontal chart, from the top: beside the bars, or above them where that has no room.

    Returns:
        (the centre of each row's bar, the bar's height).
    """
    count = len(names)
    axes.set_ylim(count - 0.4, -0.6)
    if not style.narrow:
        axes.set_yticks(range(count), [short(name, 44) for name in names])
        axes.tick_params(axis="y", length=0, labelsize=9)
        return [float(row) for row in range(count)], 0.66
    axes.set_yticks([])
    for row, name in enumerate(names):
        name_at(axes, style, name, row - 0.28)
    return [row + 0.14 for row in range(count)], 0.38


def name_at(axes: "Axes", style: Style, name: str, place: float) -> None:
    """A name at the left end of the row at `place`, on the paper's colour."""
    axes.annotate(
        short(name, 48),
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(1, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
        bbox={"facecolor": style.theme["paper"], "edgecolor": "none", "pad": 0.8},
    )


def words_behind(axes: "Axes", words: str, end: float, place: float, away: float = 5, **look: Any) -> None:
    """Words behind the end of a bar, on the paper's colour, for a line may cross there."""
    axes.annotate(
        words,
        (end, place),
        xytext=(away, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
        bbox={"facecolor": axes.figure.get_facecolor(), "edgecolor": "none", "pad": 0.8},
        **look,
    )


def row_height(style: Style) -> float:
    """Inches that a row of `name_rows` takes."""
    return 0.4 if style.narrow else 0.34


def legend_label(text: str) -> str:
    """A label that matplotlib does not leave out: it skips those that begin with an underscore."""
    return f" {short(text)}" if text.startswith("_") else short(text)
