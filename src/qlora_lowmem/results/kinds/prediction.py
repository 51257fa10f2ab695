"""Predicted beside measured: the same recipe on a GPU and on its virtual twin, by phase and by kind of reading."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own
from qlora_lowmem.results.reading import Rows, one_of, read_as
from qlora_lowmem.results.style import SMALL, Axes, Style, doubling
from qlora_lowmem.results.style import Figure as Drawn
from qlora_lowmem.results.tables import Cell, Column, gib, markdown_page, markdown_table, page_table, write_result
from qlora_lowmem.units import GIB

READINGS = ("allocated", "reserved", "device")
# The peak over all phases, beside the phases themselves.
WHOLE_RUN = "whole run"
# By how many per cent a prediction of the whole run may be off. What a card holds has its context in it, which is
# measured, not predicted, so it has no limit of its own.
LIMITS = {"allocated": 1, "reserved": 3}
_MARKS = {"allocated": ("o", "series-1"), "reserved": ("s", "series-3"), "device": ("D", "series-2")}


@dataclass(frozen=True)
class Figure:
    """One reading of one recipe in one phase, predicted and measured, in bytes."""

    recipe: str
    phase: str
    reading: Annotated[str, one_of(READINGS)]
    predicted_bytes: Count
    measured_bytes: Count

    @property
    def error(self) -> float:
        """Predicted over measured, less 1: above 0, too much was predicted."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def limit(self) -> int | None:
        """By how many per cent it may be off; None where there is no limit."""
        return LIMITS.get(self.reading) if self.phase == WHOLE_RUN else None

    def within(self, percent: int) -> bool:
        """Whether the error is at most that; in integers, so that the limit itself is within."""
        return abs(self.predicted_bytes - self.measured_bytes) * 100 <= percent * self.measured_bytes

    @property
    def tone(self) -> str:
        """Of its cell."""
        return "" if self.limit is None else "good" if self.within(self.limit) else "bad"

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", and the limit is {self.limit} %"
        return (
            f"{self.recipe}: {self.reading} over the {self.phase} predicted {self.predicted_bytes:,} bytes, "
            f"measured {self.measured_bytes:,}: {self.error:+.2%}{limit}"
        )


def compare(recipe: str, predicted: MemoryProfile, measured: MemoryProfile) -> list[Figure]:
    """Every reading of every phase that both have, then of the whole run.

    Raises:
        ValueError: `predicted` is not virtual; the two have no phase in common.
    """
    if predicted.provenance != "virtual":
        raise ValueError(f"{recipe}: the predicted profile is {predicted.provenance}; it must be virtual")
    common = [phase for phase in measured.phases if phase in predicted.phases]
    if not common:
        raise ValueError(f"{recipe}: the two profiles have no phase in common")
    pairs = [(phase, predicted.phases[phase], measured.phases[phase]) for phase in common]
    return [
        Figure(recipe, phase, reading, getattr(one, reading), getattr(other, reading))
        for phase, one, other in (*pairs, (WHOLE_RUN, predicted.peak, measured.peak))
        for reading in READINGS
    ]


def misses(figures: Iterable[Figure]) -> list[Figure]:
    """Whole-run readings that are outside of `LIMITS`."""
    return [figure for figure in figures if figure.tone == "bad"]


def write_prediction(
    folder: Path, figures: Sequence[Figure], record: dict[str, Any], context: str, not_compared: dict[str, str]
) -> None:
    """Write `prediction.json`, `.md` and `.csv` into `folder`.

    Args:
        context: where the virtual card's context and properties come from.
        not_compared: recipes without a comparison, and why.

    Raises:
        ValueError: the figures beside the predicted ones are not measured.
    """
    if record["provenance"] != "measured":
        raise ValueError(f"a prediction is held against measured figures, and these are {record['provenance']}")
    rows = [
        {
            "recipe": figure.recipe,
            "phase": figure.phase,
            "reading": figure.reading,
            "predicted_bytes": figure.predicted_bytes,
            "predicted_provenance": "virtual",
            "measured_bytes": figure.measured_bytes,
            "measured_provenance": "measured",
            "error": figure.error,
            "limit_percent": figure.limit,
        }
        for figure in figures
    ]
    left_out = "".join(f"\n- `{name}`: {why}" for name, why in not_compared.items())
    text = (
        "Peaks in GiB: **predicted** on a virtual card with the properties of the measured one, **measured** on the "
        f"card itself, the same recipe and versions. {context}"
    )
    headings = [f"{reading} {what}" for reading in READINGS for what in ("predicted", "measured", "error")]
    lines: dict[tuple[str, str], list[str]] = {}
    for figure in figures:  # in the order of READINGS within a phase
        cells = lines.setdefault((figure.recipe, figure.phase), [figure.recipe, figure.phase])
        cells += [gib(figure.predicted_bytes), gib(figure.measured_bytes), f"{figure.error:+.2%}"]
    table = markdown_table(("recipe", "phase", *headings), list(lines.values()), text_columns=2)
    parts = [text, _summary(figures), table, *((f"Not compared:{left_out}",) if left_out else ())]
    markdown = markdown_page(f"Predicted and measured on {record['device']}", parts, record)
    content = {"environment": record, "context": context, "figures": rows, "not_compared": not_compared}
    write_result(folder, "prediction", content, markdown, rows)


def _summary(figures: Sequence[Figure]) -> str:
    lines = []
    for reading in READINGS:
        if errors := [abs(f.error) for f in figures if f.phase == WHOLE_RUN and f.reading == reading]:
            limit = f", limit {LIMITS[reading]} %" if reading in LIMITS else ""
            lines.append(f"{reading}: median {statistics.median(errors):.2%}, worst {max(errors):.2%}{limit}")
    return f"Errors of the whole run over {len({f.recipe for f in figures})} recipes: {'; '.join(lines)}."


@dataclass(frozen=True)
class _File:
    figures: Rows[Figure]
    context: str
    not_compared: Mapping[str, str]


def _read(content: Mapping[str, Any]) -> _File:
    file = read_as(_File, content)
    for figure in file.figures:
        if not (figure.predicted_bytes and figure.measured_bytes):
            raise ValueError(f"figures: a peak of {figure.recipe!r} is 0 bytes")
    if not any(figure.phase == WHOLE_RUN for figure in file.figures):
        raise ValueError(f"figures: none of a {WHOLE_RUN}")
    return file


def _section(provenance: Provenance, data: _File) -> Section:
    whole = [figure for figure in data.figures if figure.phase == WHOLE_RUN]
    judged = [figure for figure in whole if figure.limit is not None]
    within = len(judged) - len(misses(judged))
    worst = max(whole, key=lambda figure: abs(figure.error))
    summary = (
        f"{within} of {len(judged)} readings of whole runs are within their limits "
        f"({', '.join(f'{reading} {limit} %' for reading, limit in LIMITS.items())}). The worst: {worst.recipe}, "
        f"{worst.reading}, {worst.error:+.2%}."
    )
    table = page_table("Peaks in GiB, predicted and measured", _COLUMNS, data.figures)
    title, where = "Predicted against measured", provenance.where
    chart = Chart("prediction", title, where, summary, lambda style: prediction(style, whole), (table,))
    left_out = list(data.not_compared.items())
    return Section(
        name="prediction",
        title="Predicted against measured",
        text=f"Each recipe on {provenance.device} (measured) and on a virtual card with its properties (virtual). "
        f"{data.context}",
        charts=(chart,),
        tables=(page_table("Not compared", _LEFT_OUT, left_out),) if left_out else (),
        highlights=((f"{worst.error:+.2%}", "the worst prediction of a whole run's peak"),),
    )


_LEFT_OUT: tuple[Column[tuple[str, str]], ...] = (
    Column("recipe", lambda row: Cell(row[0])),
    Column("why", lambda row: Cell(row[1])),
)
_COLUMNS: tuple[Column[Figure], ...] = (
    Column("recipe", lambda figure: Cell(figure.recipe)),
    Column("phase", lambda figure: Cell(figure.phase)),
    Column("reading", lambda figure: Cell(figure.reading)),
    Column("predicted", lambda figure: Cell.gib(figure.predicted_bytes)),
    Column("measured", lambda figure: Cell.gib(figure.measured_bytes)),
    Column("error", lambda figure: Cell.ratio(f"{figure.error:+.2%}", figure.error, figure.tone)),
    Column("limit", lambda figure: Cell("-" if figure.limit is None else f"{figure.limit} %")),
)


KIND = Kind(
    "a prediction (pytest bench/ --gpu)",
    lambda content: content.keys() >= {"figures", "not_compared"},
    _read,
    each_its_own(_section),
)


def prediction(style: Style, figures: Sequence[Figure]) -> Drawn:
    """Two panels, side by side or one above the other, of readings of whole runs, at least one."""
    recipes = list(dict.fromkeys(figure.recipe for figure in figures))
    rows = style.row_height * len(recipes)
    figure, scatter, errors = two_panels(style, rows, rows + 5.2 if style.narrow else max(rows + 1.4, 4.0))
    equals(
        scatter, style, [size / GIB for figure in figures for size in (figure.predicted_bytes, figure.measured_bytes)]
    )
    for each in figures:
        scatter.plot(
            each.measured_bytes / GIB, each.predicted_bytes / GIB, markersize=6, **style.mark(*_MARKS[each.reading])
        )
    scatter.set_xlabel("measured GiB")
    scatter.set_ylabel("predicted GiB")
    _errors(errors, style, figures, recipes)
    names = {"allocated": "allocated", "reserved": "reserved", "device": "on the card"}
    handles = [style.stroke(names[reading], linestyle="none", **style.mark(*_MARKS[reading])) for reading in READINGS]
    limits = ", ".join(f"{names[reading]} {limit} %" for reading, limit in LIMITS.items())
    handles.append(style.stroke(f"limits: {limits}", color="limit", linestyle=(0, (4, 3)), linewidth=1))
    style.legend(figure, handles, 2 if style.narrow else 4)
    return figure


def two_panels(style: Style, rows: float, height: float) -> tuple[Drawn, Axes, Axes]:
    """Figures against each other, and beside or below that their errors in rows of that many inches in all."""
    figure = style.figure(height)
    if style.narrow:
        return figure, *figure.subplots(2, 1, height_ratios=(3.2, rows + 0.9))
    return figure, *figure.subplots(1, 2, width_ratios=(1, 1.15))


def percent_axis(axes: Axes) -> None:
    """Errors along x, signed."""
    axes.set_xlabel("predicted over measured, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")


def equals(axes: Axes, style: Style, sizes: Sequence[float]) -> None:
    """Two logarithmic scales, each with room for all sizes in GiB, and the line on which both are equal."""
    low = math.floor(math.log2(min(sizes)))
    high = max(math.ceil(math.log2(max(sizes))), low + 1)
    ends = (2.0**low, 2.0**high)
    axes.plot(ends, ends, color=style.theme["edge"], linewidth=1, linestyle="--")
    doubling(axes, "x", low, high)
    doubling(axes, "y", low, high)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_box_aspect(0.8 if style.narrow else 1)
    muted = style.theme["muted"]
    axes.text(0.97, 0.05, "dashed: equal", transform=axes.transAxes, ha="right", fontsize=SMALL, color=muted)
    style.plain(axes, keep=("bottom", "left"), grid="y")


def _errors(axes: Axes, style: Style, figures: Sequence[Figure], recipes: Sequence[str]) -> None:
    places, _ = style.name_rows(axes, recipes)
    place_of = dict(zip(recipes, places, strict=True))
    for side in (side for limit in set(LIMITS.values()) for side in (-limit, limit)):
        axes.axvline(side, color=style.theme["limit"], linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(0, color=style.theme["edge"], linewidth=1)
    for figure in figures:
        axes.plot(100 * figure.error, place_of[figure.recipe], markersize=6, **style.mark(*_MARKS[figure.reading]))
    reach = max(*LIMITS.values(), *(abs(100 * figure.error) for figure in figures)) * 1.15
    axes.set_xlim(-reach, reach)
    percent_axis(axes)
    style.plain(axes)
