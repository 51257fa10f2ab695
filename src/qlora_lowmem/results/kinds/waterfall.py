"""From the baseline to lean, one idea a row: what is left of the peak, and what the idea took off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.style import Axes, Figure, Style, save
from qlora_lowmem.results.subject import subject
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    Cell,
    Column,
    gib,
    launches_column,
    markdown_of,
    page_table,
    usable_bytes,
    write_rows,
)
from qlora_lowmem.units import GIB


@dataclass(frozen=True)
class Step:
    """One idea more than the step before, in the recipe's words, and the peaks and the floor of the recipe with it.

    Attributes:
        tokens: of a sample, with this idea; 0 where the file does not say.
        launches: kernels, copies and memsets of a micro-batch with it; None where the file does not say.
    """

    idea: str
    peak_allocated_bytes: Count
    peak_device_bytes: Count
    floor_bytes: Count
    tokens: Count = 0
    launches: Count | None = None


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
    launches_column("launches a micro-batch", lambda row: row[0].launches),
)


_TITLE = "From the baseline to lean"
_MUCH_LONGER = 1.5


def _rows(steps: Sequence[Step]) -> list[_Row]:
    peaks = [step.peak_allocated_bytes for step in steps]
    return list(zip(steps, [None, *(before - after for before, after in pairwise(peaks))], strict=True))


def write_waterfall(folder: Path, model: str, steps: Sequence[Step], record: dict[str, Any]) -> None:
    """Write `waterfall` under `folder` as JSON, Markdown, CSV, SVG and PNG."""
    rows = _rows(steps)
    text = (
        f"{model}, peaks in GiB, one idea more a row; a negative saving is what training more layers costs. "
        f"{FLOOR_TEXT}"
    )
    cases = [
        {
            "idea": step.idea,
            "peak_allocated_bytes": step.peak_allocated_bytes,
            "saves_bytes": saved or 0,
            "peak_device_bytes": step.peak_device_bytes,
            "floor_bytes": step.floor_bytes,
            "tokens": step.tokens,
            "launches": step.launches,
        }
        for step, saved in rows
    ]
    parts = (text, markdown_of(_COLUMNS, rows), "![waterfall](waterfall.svg)")
    head = {name: record[name] for name in ("device", "provenance")} | {"model": model}
    write_rows(folder, "waterfall", cases, record, title=_TITLE, parts=parts, head=head)
    usable = usable_bytes(record["device"])
    where = "{device} ({provenance})".format_map(record)
    heading = f"{_TITLE}: {_subject(model, steps, on=where)}"
    save(lambda style: waterfall(style, steps, usable), heading, folder / "waterfall.svg", folder / "waterfall.png")


def _subject(model: str, steps: Sequence[Step], on: str) -> str:
    lengths = dict.fromkeys(f"{step.tokens:,}" for step in steps if step.tokens)
    return subject(model, f"{' then '.join(lengths)} tokens" if lengths else "", on=on)


@dataclass(frozen=True)
class _File(Cases[Step]):
    model: str = ""


def _read(content: Mapping[str, Any]) -> _File:
    file = read_as(_File, content)
    for number, step in enumerate(file.cases):
        if not (step.peak_allocated_bytes and step.peak_device_bytes and step.floor_bytes):
            raise ValueError(f"cases[{number}] has a peak or a floor of 0 bytes")
    return file


def _section(provenance: Provenance, file: _File) -> Section:
    steps = file.cases
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
        _subject(file.model, steps, on=provenance.where),
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
        model=file.model,
    )


KIND = Kind("a waterfall (pytest bench/test_lean.py)", has_rows("cases", "idea"), _read, each_its_own(_section))


def waterfall(style: Style, steps: Sequence[Step], usable_bytes: int | None) -> Figure:
    """A bar a step, and what a job can count on on the card, where that is known.

    Bars begin at 0 and their lengths are true. Where the longest is much longer than the card, the same bars stand
    beside them once more, on a scale that ends at the card.
    """
    figure = style.figure(style.row_height * len(steps) + (1.25 if style.narrow else 1.2))
    largest = max(max(step.peak_allocated_bytes, step.peak_device_bytes) for step in steps) / GIB
    usable = usable_bytes / GIB if usable_bytes is not None else None
    ends = [largest] if usable is None or largest < _MUCH_LONGER * usable else [largest, usable]
    panels = figure.subplots(1, len(ends), sharey=True, squeeze=False, width_ratios=(1, 1.8)[-len(ends) :])[0]
    places, height = style.name_rows(panels[0], [step.idea for step in steps])
    panels[0].set_zorder(1)  # a name above a bar may be longer than its panel
    for axes, end in zip(panels, ends, strict=True):
        axes.set_xlim(0, end * 1.06)
        if usable is not None:
            axes.axvline(usable, color=style.theme["limit"], linewidth=1.2, linestyle="--", zorder=0.9)
        for place, row in zip(places, _rows(steps), strict=True):
            _draw(axes, style, place, height, row)
        axes.locator_params(axis="x", nbins=3 if axes is not panels[-1] or style.narrow else 6)
        style.plain(axes, grid="x")
    for place, row in zip(places, _rows(steps), strict=True):
        _words(panels[-1], style, place, row)
    panels[0].set_xlabel("peak, GiB")
    if len(ends) > 1:
        panels[1].set_xlabel("the same, cut at the card")
        panels[1].tick_params(axis="y", left=False, labelleft=False)
    ring = {"linestyle": "none", "marker": "o", "markerfacecolor": "paper", "markeredgecolor": "ink"}
    handles = [
        style.patch("allocated", color="bar"),
        style.patch("saved by this idea", color="saved"),
        style.patch("cost of this idea", color="bad"),
        style.stroke("floor", color="floor", linewidth=2.5),
        style.stroke("on the card, with context", **ring),
    ]
    if usable is not None:
        handles.append(style.stroke(f"usable on the card: {usable:.2f}", color="limit", linestyle="--", linewidth=1.2))
    style.legend(figure, handles, 2 if style.narrow else 3, columnspacing=1.0)
    return figure


def _draw(axes: Axes, style: Style, place: float, height: float, row: _Row) -> None:
    step, saved = row
    peak, previous = step.peak_allocated_bytes / GIB, (step.peak_allocated_bytes + (saved or 0)) / GIB
    low, high = sorted((peak, previous))
    for left, right, role in ((0.0, low, "bar"), (low, high, "saved" if previous > peak else "bad")):
        axes.barh(place, right - left, left=left, height=height, color=style.theme[role], linewidth=0)
    style.tick(axes, step.floor_bytes / GIB, place, height / 2 + 0.04, "floor")
    ring = style.mark("o", "ink", "paper", 1.0)
    axes.plot(step.peak_device_bytes / GIB, place, markersize=5.5, linestyle="none", **ring)


def _words(axes: Axes, style: Style, place: float, row: _Row) -> None:
    """The peak and what the idea changed, right of all bars; beside the name where that has no room."""
    step, saved = row
    change = "" if saved is None else f" ({'−' if saved > 0 else '+'}{abs(saved) / GIB:.3f})"
    words = f"{step.peak_allocated_bytes / GIB:.3f}{change}"
    if style.narrow:
        style.row_words(axes, words, 1, place)
    else:
        style.words(axes, words, 1, place, xycoords=("axes fraction", "data"))
