"""Files in, one HTML page out: which file is of which kind, and every chart inline in two widths, with its figures.

The page has no script and fetches nothing. A new kind is a file in `kinds/` and a line in `KINDS`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import qlora_lowmem
from qlora_lowmem.errors import UsageError
from qlora_lowmem.results.kinds import (
    Chart,
    Kind,
    Section,
    Source,
    attribution,
    families,
    lengths,
    longest,
    matrix,
    phases,
    prediction,
    published,
    run,
    verdicts,
    waterfall,
)
from qlora_lowmem.results.reading import read_json
from qlora_lowmem.results.style import DARK, LIGHT, TOKENS, Style, css_variables, inline, save, svg_text

_HERE = Path(__file__).parent


# In the order of the page.
_MODULES = waterfall, families, attribution, phases, run, lengths, longest, prediction, published, verdicts, matrix
KINDS: tuple[Kind[Any], ...] = tuple(module.KIND for module in _MODULES)
_SHOWN = "; ".join(kind.text for kind in KINDS)


@dataclass(frozen=True)
class Made:
    """Sections in the order of the page, and JSON files of a folder that none of them shows."""

    sections: tuple[Section, ...]
    left_out: tuple[Path, ...]


def sections_of(paths: Sequence[Path]) -> Made:
    """Read files, and the JSON files of folders.

    Raises:
        UsageError: a file that cannot be read or is not what it should be; a file that was named and that no section
            can show; nothing to show.
    """
    named = [path for path in paths if not path.is_dir()]
    inside = (sorted(path.glob("*.json")) if path.is_dir() else [path] for path in paths)
    files = list(dict.fromkeys(file for each in inside for file in each))
    found: dict[Kind[Any], list[tuple[Source, Any]]] = {}
    left_out = []
    for path in files:
        content = read_json(path)
        kind = next((kind for kind in KINDS if content is not None and kind.recognises(content)), None)
        if path not in named and (content is None or kind is None):
            left_out.append(path)
            continue
        if content is None:
            raise UsageError(f"{path} holds no object; give a file that a command of this project wrote")
        if kind is None:
            raise UsageError(f"{path} is nothing that a page shows. It shows {_SHOWN}")
        try:
            data, provenance = kind.read(content), kind.provenance(content)
        except ValueError as error:
            raise UsageError(f"{path} is not {kind.text} as it should be: {error}; write it again") from None
        alone = sum(other.name == path.name for other in files) == 1
        label = path.name if alone else f"{path.resolve().parent.name}/{path.name}"
        found.setdefault(kind, []).append((Source(label, provenance), data))
    if not found:
        given = ", ".join(str(path) for path in paths)
        raise UsageError(f"{given}: nothing in it that a page shows. It shows {_SHOWN}")
    return Made(
        tuple(section for kind in KINDS if kind in found for section in kind.sections(found[kind])), tuple(left_out)
    )


def render(title: str, sections: Sequence[Section], note: Callable[[], object]) -> str:
    """The page; `note` is called after each chart."""
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
    """A title that names the models and the cards, but for those of others."""
    own = [section for section in sections if not section.quoted]
    models = dict.fromkeys(model for section in own for model in section.model.split(", ") if model)
    of = f" of {', '.join(models)}" if models else ""
    devices = dict.fromkeys(source.provenance.device for section in own for source in section.sources)
    return f"GPU memory{of} on {', '.join(devices)}" if devices else "GPU memory, predicted and published"


def save_charts(folder: Path, sections: Sequence[Section], note: Callable[[], object]) -> list[Path]:
    """Write every chart as NAME.svg and NAME.png, wide and on white, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in (chart for section in named(sections) for chart in section.charts):
        paths = [folder / f"{chart.name}{suffix}" for suffix in (".svg", ".png")]
        save(chart.draw, chart.heading, *paths)
        written += paths
        note()
    return written


def named(sections: Sequence[Section]) -> list[Section]:
    """The same sections, each and each chart under a name of its own that suits a file and an address."""
    taken, taken_by_charts = {"main", "made-of", "top"}, set[str]()
    found = []
    for section in sections:
        name = _unique(section.name, taken)
        charts = (replace(chart, name=_unique(chart.name, taken_by_charts)) for chart in section.charts)
        found.append(replace(section, name=name, charts=tuple(charts)))
    return found


def _unique(name: str, taken: set[str]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "part"
    found = next(each for each in chain((slug,), (f"{slug}-{number}" for number in count(2))) if each not in taken)
    taken.add(found)
    return found


def _draw(chart: Chart, note: Callable[[], object]) -> dict[str, Any]:
    """A chart with its two drawings, `wide` and `narrow`, as SVG elements."""
    drawn: dict[str, Any] = {"chart": chart}
    for width, narrow in (("wide", False), ("narrow", True)):
        text = svg_text(chart.draw, Style(TOKENS, narrow))
        # matplotlib escaped every text of it, and it was written anew from what a parser read.
        drawn[width] = Markup(inline(text, f"chart-{chart.name}-{width}", chart.heading, f"chart-{chart.name}-summary"))
    note()
    return drawn
