"""Sections as one HTML file: every chart inline in two widths, every figure in a table, no script, nothing to fetch."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

import qlora_lowmem
from qlora_lowmem.results.kind import Chart, Section
from qlora_lowmem.results.style import Style, save, svg_text
from qlora_lowmem.results.svg import inline
from qlora_lowmem.results.theme import DARK, LIGHT, TOKENS, css_variables

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Drawn:
    """A chart as SVG elements."""

    chart: Chart
    wide: Markup
    narrow: Markup


def render(title: str, sections: Sequence[Section], note: Callable[[], object]) -> str:
    """The page.

    Args:
        note: called after each chart.
    """
    sections = named(sections)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawn = [(section, [_draw(chart, note) for chart in section.charts]) for section in sections]
    sources = [(section, source) for section in sections for source in section.sources]
    versions = {tuple(source.provenance.versions.items()) for _, source in sources}
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=drawn,
        sources=sources,
        versions=dict(versions.pop()) if len(versions) == 1 else None,
        highlights=[highlight for section in sections for highlight in section.highlights],
        quoted=any(section.quoted for section in sections),
        provenances=sorted({source.provenance.provenance for _, source in sources}),
        release=qlora_lowmem.__version__,
        light=Markup(css_variables(LIGHT)),
        dark=Markup(css_variables(DARK)),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
    )


def title_of(sections: Sequence[Section]) -> str:
    """A title that names the cards, but for those of others."""
    own = (section for section in sections if not section.quoted)
    devices = dict.fromkeys(source.provenance.device for section in own for source in section.sources)
    return f"GPU memory on {', '.join(devices)}" if devices else "GPU memory, predicted and published"


def save_charts(folder: Path, sections: Sequence[Section], note: Callable[[], object]) -> list[Path]:
    """Write every chart as NAME.svg and NAME.png, wide and on white, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in (chart for section in named(sections) for chart in section.charts):
        paths = [folder / f"{chart.name}{suffix}" for suffix in (".svg", ".png")]
        save(chart.draw, chart.title, *paths)
        written += paths
        note()
    return written


def named(sections: Sequence[Section]) -> list[Section]:
    """The same sections, each and each chart under a name of its own that suits a file and an address."""
    taken, taken_by_charts = {"main", "made-of", "top"}, set[str]()
    found = []
    for section in sections:
        name = _unique(section.name, taken)
        charts = tuple(
            dataclasses.replace(chart, name=_unique(chart.name, taken_by_charts)) for chart in section.charts
        )
        found.append(dataclasses.replace(section, name=name, charts=charts))
    return found


def _unique(name: str, taken: set[str]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "part"
    number, found = 1, slug
    while found in taken:
        number += 1
        found = f"{slug}-{number}"
    taken.add(found)
    return found


def _draw(chart: Chart, note: Callable[[], object]) -> _Drawn:
    widths = {}
    for width, narrow in (("wide", False), ("narrow", True)):
        text = svg_text(chart.draw, Style(TOKENS, narrow))
        # matplotlib escaped every text of it, and it was written anew from what a parser read.
        widths[width] = Markup(inline(text, f"chart-{chart.name}-{width}", chart.title, f"chart-{chart.name}-summary"))
    note()
    return _Drawn(chart, widths["wide"], widths["narrow"])
