"""How charts look: two widths, a font size a purpose, colours by role (`theme.toml`); matplotlib's SVG made small."""

import re
import textwrap
import tomllib
import warnings
import xml.etree.ElementTree as ET  # only ever reads what matplotlib wrote
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from qlora_lowmem.files import write_whole

if TYPE_CHECKING:  # matplotlib is imported when something is drawn; these names are for annotations only
    from matplotlib.artist import Artist as Artist
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
else:
    Artist = Axes = Figure = Any

SMALL = 8.5  # points; no text is smaller than that
_DPI = 150
# Layers of a group whose id begins so meet without a seam.
CRISP = "crisp"

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COMMAND = re.compile(r"([MLCQz])([-0-9.e\s]*)")


@dataclass(frozen=True)
class Group:
    """Keys of `memory.kinds.KINDS` that are drawn as one; `role` is its colour in a `Theme`, `brief` a shorter text."""

    role: str
    text: str
    brief: str
    kinds: tuple[str, ...]


_DATA = tomllib.loads(Path(__file__).with_name("theme.toml").read_text(encoding="utf-8"))
GROUPS = msgspec.convert(_DATA["groups"], tuple[Group, ...])
SERIES = tuple(role for role in _DATA["colours"] if role.startswith("series-"))
_BLACK, _WHITE = "#16181d", "#ffffff"


@dataclass(frozen=True)
class Theme:
    """Colours as `#rrggbb` by role. `on-ROLE` is the ink for text on a group's colour."""

    colours: Mapping[str, str]

    def __getitem__(self, role: str) -> str:
        return self.colours[role]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2, "contrast ratio" and "relative luminance")."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _colours(which: int) -> Theme:
    colours = {role: pair[which] for role, pair in _DATA["colours"].items()}
    roles = [group.role for group in GROUPS]
    inks = {f"on-{role}": max(_BLACK, _WHITE, key=partial(contrast, colours[role])) for role in roles}
    return Theme(MappingProxyType(colours | inks))


LIGHT, DARK = _colours(0), _colours(1)
# A colour of its own for every role, to be found again in a drawing and replaced by the role's name.
TOKENS = Theme(MappingProxyType({role: f"#{code:06x}" for code, role in enumerate(LIGHT.colours, start=0x0A0001)}))
ROLE_OF: Mapping[str, str] = MappingProxyType({colour: role for role, colour in TOKENS.colours.items()})


def css_variables(theme: Theme) -> str:
    """The theme as CSS declarations, `--ROLE: #rrggbb;` each."""
    return " ".join(f"--{role}: {colour};" for role, colour in theme.colours.items())


@dataclass(frozen=True)
class Style:
    """A theme and a width, 3.7 inches if narrow, else 8.6: about as on the page, so that a point of text stays one."""

    theme: Theme = LIGHT
    narrow: bool = False

    def figure(self, height: float) -> Figure:
        """An empty figure of that many inches in height."""
        from matplotlib.figure import Figure

        size = (3.7 if self.narrow else 8.6, height)
        return Figure(figsize=size, layout="constrained", facecolor=self.theme["paper"])

    @property
    def row_height(self) -> float:
        """Inches that a row of `name_rows` takes."""
        return 0.36 if self.narrow else 0.34

    def name_rows(self, axes: Axes, names: Sequence[str]) -> tuple[list[float], float]:
        """Name rows from the top, beside their bars or, where that has no room, above; the bars' centres and height."""
        count = len(names)
        axes.set_ylim(count - 0.4, -0.6)
        if not self.narrow:
            axes.set_yticks(range(count), [short(name, 44) for name in names])
            axes.tick_params(axis="y", length=0, labelsize=9)
            return [float(row) for row in range(count)], 0.66
        axes.set_yticks([])
        for row, name in enumerate(names):
            self.name_at(axes, name, row - 0.28)
        return [row + 0.14 for row in range(count)], 0.38

    def name_at(self, axes: Axes, name: str, place: float) -> None:
        """A name at the left end of the row at `place`, on the paper's colour."""
        self.words(axes, short(name, 48), 0, place, 1, xycoords=("axes fraction", "data"), in_layout=False)

    def words(self, axes: Axes, words: str, end: float, place: float, away: float = 5, **look: Any) -> None:
        """Words behind the end of a bar, on the paper's colour, for a line may cross there."""
        look |= {"va": "center", "bbox": {"facecolor": self.theme["paper"], "edgecolor": "none", "pad": 0.8}}
        note(axes, words, (end, place), (away, 0), **look)

    def row_words(self, axes: Axes, words: str, end: float, place: float, away: float = 5) -> None:
        """Words behind the end of a named row's bar; beside the name where that has no room."""
        if self.narrow:
            self.words(axes, words, 1, place - 0.42, 0, xycoords=("axes fraction", "data"), ha="right")
        else:
            self.words(axes, words, end, place, away)

    def tick(self, axes: Axes, value: float, place: float, half: float, role: str, width: float = 2.5) -> None:
        """An upright mark through the bar at `place`, `half` a row to either side."""
        axes.plot([value, value], [place - half, place + half], color=self.theme[role], linewidth=width)

    def plain(self, axes: Axes, *, keep: Sequence[str] = ("bottom",), grid: Literal["x", "y", ""] = "") -> None:
        """Only the spines that carry ticks, and a quiet grid along `grid` (`x`, `y` or none)."""
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(side in keep)
        if grid:
            axes.grid(axis=grid, color=self.theme["grid"], linewidth=0.8)
            axes.set_axisbelow(True)

    def look(self, **settings: Any) -> dict[str, Any]:
        """Settings of matplotlib whose colours may be roles."""
        colours = self.theme.colours
        return {name: colours.get(value, value) if "color" in name else value for name, value in settings.items()}

    def mark(self, marker: str, edge: str, face: str = "none", width: float = 1.4) -> dict[str, Any]:
        """Settings of a mark, its outline and its inside by role, for a drawing and for its legend."""
        return self.look(marker=marker, markeredgecolor=edge, markerfacecolor=face, markeredgewidth=width)

    def patch(self, label: str, **settings: Any) -> Artist:
        """A legend's handle for an area; colours may be roles."""
        from matplotlib.patches import Patch

        return Patch(label=label, **self.look(**settings))

    def stroke(self, label: str, **settings: Any) -> Artist:
        """A legend's handle for a line or a mark; colours may be roles."""
        from matplotlib.lines import Line2D

        return Line2D([], [], label=label, **self.look(**settings))

    def legend(self, figure: Figure, handles: Sequence[Artist], columns: int, **settings: Any) -> None:
        """A legend below the drawing, without a frame."""
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, **settings)


Drawing = Callable[[Style], Figure]


@contextmanager
def drawing(style: Style) -> Iterator[None]:
    """matplotlib's settings for a figure, from its first artist to its file: the same data, the same bytes."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    ink, edge = style.theme["ink"], style.theme["edge"]
    settings: Any = {f"{part}.labelcolor": ink for part in ("axes", "legend", "xtick", "ytick")}
    for ticks in ("xtick", "ytick"):
        settings |= {f"{ticks}.color": edge, f"{ticks}.labelsize": SMALL, f"{ticks}.major.size": 3}
    settings |= {
        "axes.edgecolor": edge,
        "axes.facecolor": "none",
        "axes.labelsize": 9,
        "axes.prop_cycle": cycler(color=[ink]),  # what has no colour of its own
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "hatch.color": edge,
        "hatch.linewidth": 0.6,
        "legend.fontsize": SMALL,
        "lines.color": ink,
        "svg.fonttype": "none",
        "svg.hashsalt": "qlora_lowmem",
        "text.color": ink,
        "text.parse_math": False,  # names are names, dollars in them included
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A reader's browser has the characters that the font of the drawing lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg_text(draw: Drawing, style: Style) -> str:
    """The drawing as an SVG document, as matplotlib writes it."""
    text = StringIO()
    with drawing(style):
        draw(style).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(draw: Drawing, title: str, *paths: Path) -> None:
    """Write the drawing under its title, wide and on white, each file whole or not at all.

    The paths' suffixes (.svg, .png) say the formats.
    """
    for path in paths:
        write_whole(path, as_file(path.suffix[1:], draw, title))


def as_file(kind: str, draw: Drawing, title: str) -> bytes:
    """What a file of the drawing under its title holds, wide and on white: `svg` or `png`."""

    def titled(style: Style) -> Figure:
        figure = draw(style)
        figure.suptitle(textwrap.fill(title, 82), fontsize=11, fontweight="bold", x=0.01, ha="left")
        return figure

    style = Style()
    if kind == "svg":
        root = _compact(svg_text(titled, style))
        root.insert(0, ET.Element(f"{{{_SVG}}}title"))
        root[0].text = title
        return (ET.tostring(root, encoding="unicode") + "\n").encode()
    content = BytesIO()
    with drawing(style):
        titled(style).savefig(content, format=kind, dpi=_DPI)
    return content.getvalue()


def inline(text: str, prefix: str, label: str, described_by: str) -> str:
    """The drawing as an `svg` element for an HTML page.

    Args:
        text: an SVG document drawn in `theme.TOKENS`.
        prefix: makes its ids unique in the page.
        label, described_by: its accessible name; the id of the element that says in words what it shows.

    Raises:
        KeyError: a colour that no role has.
    """
    root = _compact(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _theme(element, prefix)
    for sheet in [child for child in root.iter("defs") if child.find("style") is not None]:
        root.remove(sheet)  # its rule is for every element of the page
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": label, "aria-describedby": described_by}
    return ET.tostring(root, encoding="unicode")


def _compact(text: str) -> ET.Element:
    """The document with short paths and without metadata."""
    root = ET.fromstring(text)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    used = set(_REFERENCE.findall(text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    _shorten(root, used, crisp=False)
    return root


def _shorten(element: ET.Element, used: set[str], *, crisp: bool) -> None:
    name = element.get("id", "")
    crisp = crisp or name.startswith(CRISP)
    if name not in used:
        element.attrib.pop("id", None)
    if "d" in element.attrib:
        element.set("d", shorter_path(element.attrib["d"]))
        if crisp:
            element.set("shape-rendering", "crispEdges")
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    element.text = element.text if element.tag.endswith(("}text", "}style")) else None
    element.tail = None
    for child in element:
        _shorten(child, used, crisp=crisp)


def _theme(element: ET.Element, prefix: str) -> None:
    """Its ids and references under `prefix`, its colours by role."""
    if "id" in element.attrib:
        element.set("id", f"{prefix}-{element.attrib['id']}")
    if _HREF in element.attrib:
        element.set("href", f"#{prefix}-{element.attrib.pop(_HREF)[1:]}")
    style = [part for part in element.get("style", "").split("; ") if part and not part.startswith("font-family")]
    if element.get("fill", "").startswith("#"):  # a pattern's ground
        style.append(f"fill: {element.attrib.pop('fill')}")
    if style:
        element.set("style", _COLOUR.sub(lambda found: f"var(--{ROLE_OF[found[0]]})", "; ".join(style)))
    for name in {"clip-path", "style"} & element.attrib.keys():
        element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", element.attrib[name]))


def shorter_path(path: str) -> str:
    """The same path to a hundredth of a point: level and upright lines in short, and as one where they go on.

    Raises:
        ValueError: a command other than M, L, Q, C and z in capitals.
    """
    found = _COMMAND.findall(path)
    if "".join(map("".join, found)) != path:
        raise ValueError(f"a path of other commands than M, L, Q, C and z: {path[:80]!r}")
    parts: list[tuple[str, tuple[float, ...]]] = []
    before = here = (0.0, 0.0)
    for command, text in found:
        numbers = tuple(round(float(number), 2) for number in text.split())
        if command != "L":
            parts.append((command, numbers))
            if numbers:
                before, here = here, (numbers[-2], numbers[-1])
            continue
        there = (numbers[0], numbers[1])
        if there == here:
            continue
        short = "V" if there[0] == here[0] else "H" if there[1] == here[1] else "L"
        along = "HV".find(short)
        onward = along >= 0 and (there[along] > here[along]) == (here[along] > before[along])
        if onward and parts[-1][0] == short:
            parts.pop()
        else:
            before = here
        parts.append((short, (there[along],) if along >= 0 else there))
        here = there
    return "".join(command + " ".join(f"{number:g}" for number in numbers) for command, numbers in parts)


def short(text: str, limit: int = 36) -> str:
    """A name that leaves room for the chart."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def legend_label(text: str) -> str:
    """A label that matplotlib does not leave out: it skips those that begin with an underscore."""
    return f" {short(text)}" if text.startswith("_") else short(text)


def note(axes: Axes, text: str, place: tuple[float, float], away: tuple[float, float], **look: Any) -> None:
    """Small words, `away` points right of and above their place on the axes."""
    axes.annotate(text, place, xytext=away, textcoords="offset points", fontsize=SMALL, **look)


def doubling(axes: Axes, along: Literal["x", "y"], low: int, high: int, every: int = 1) -> None:
    """A logarithmic scale with ticks at powers of two, from 2^low on to 2^high."""
    ticks = [2.0**power for power in range(low, high + 1, every)]
    getattr(axes, f"set_{along}scale")("log", base=2)
    getattr(axes, f"set_{along}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
