"""Where the bytes of a peak are: by kind and by line of code, run by run and side by side, and over a step's time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.files import as_dataclass, write_whole
from qlora_lowmem.memory.attribution import Attribution, OwnerLine
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results import timeline
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, provenance_of, together
from qlora_lowmem.results.reading import read_as
from qlora_lowmem.results.style import GROUPS, SMALL, Artist, Axes, Figure, Style, as_file, note
from qlora_lowmem.results.subject import Said, model_names, subject
from qlora_lowmem.results.tables import (
    Cell,
    Column,
    Table,
    gib,
    launches_in_words,
    markdown_of,
    page_table,
    provenance_lines,
    times_floor,
    usable_bytes,
    write_result,
)
from qlora_lowmem.results.timeline import draw_timeline, group_bytes, group_fill, group_legend
from qlora_lowmem.units import GIB, MIB, format_bytes
from qlora_lowmem.virtual_gpu import Launches

_OWNERS = 12  # of a page


@dataclass(frozen=True)
class _Share:
    """A kind's bytes, or a subtotal's, of all that the card holds."""

    text: str
    count: int
    total: int
    tone: str = ""


_SHARES: tuple[Column[_Share], ...] = (
    Column(
        "kind",
        lambda row: Cell(f"**{row.text}**" if row.tone else row.text),
        page_cell=lambda row: Cell(row.text, tone=row.tone),
    ),
    Column("bytes", lambda row: Cell(f"{row.count:,}", row.count, row.tone)),
    Column("GiB", lambda row: Cell.gib(row.count, row.tone)),
    Column("share", lambda row: Cell.ratio(f"{100 * row.count / row.total:.1f} %", row.count / row.total, row.tone)),
)
_OWNER_COLUMNS: tuple[Column[OwnerLine], ...] = (
    Column("line", lambda row: Cell(row.line), "line of code"),
    Column("kind", lambda row: Cell(KINDS[row.kind])),
    Column("largest for", lambda row: Cell(f"{row.module} {row.layout}".strip())),
    Column("blocks", lambda row: Cell(str(row.blocks)), page_cell=lambda row: Cell.count(row.blocks)),
    Column(
        "MiB",
        lambda row: Cell(f"{row.bytes / MIB:.2f}"),
        page_cell=lambda row: Cell(f"{row.bytes / MIB:,.2f}", row.bytes),
    ),
)


def _shares(found: Attribution) -> list[_Share]:
    """Each kind that is there, the allocated peak as a subtotal and the device's as the total."""
    total = found.device_bytes
    rows = [_Share(text, found.kinds[kind], total) for kind, text in KINDS.items() if kind in found.kinds]
    inside = sum(kind not in OUTSIDE_ALLOCATED for kind in found.kinds)
    rows.insert(inside, _Share("allocated", found.allocated_bytes, total, "strong"))
    return [*rows, _Share("on the card", total, total, "strong")]


def owners_table(found: Attribution, limit: int = 15) -> str:
    """The lines of code that own most of the peak, as a Markdown table; what is unexplained is always among them."""
    unexplained = [owner for owner in found.owners[limit:] if owner.kind == "unexplained"]
    return markdown_of(_OWNER_COLUMNS, [*found.owners[:limit], *unexplained], text_columns=3)


def headline(found: Attribution) -> str:
    """One sentence: how much, where, when, and on what if the card is too small for it."""
    return (
        f"{found.device} ({found.provenance}): {format_bytes(found.allocated_bytes)} allocated, "
        f"{format_bytes(found.device_bytes)} on the card{_too_small(found)}; the {found.phase} peak comes in "
        f"{found.moment}"
    )


def _too_small(found: Attribution) -> str:
    """What a job could use, of a virtual card that has less than the peak; it ran elsewhere if that is beyond all."""
    usable = usable_bytes(found.device)
    if found.provenance != "virtual" or usable is None or found.device_bytes <= usable:
        return ""
    beyond = found.device_bytes > virtual_gpu.get_card(found.device).total_bytes
    where = ", so it ran on a card of the same kind with room for it" if beyond else ""
    return f", more than the {gib(usable)} GiB that a job can use there{where}"


def markdown(found: Attribution, title: str, floor_bytes: int, launches: Launches | None = None) -> str:
    """A page: title, the peak in a sentence, its floor and the launches of a step in others, both tables."""
    beside = (
        f"The floor, which no method avoids, is {format_bytes(floor_bytes)}; allocated is "
        f"{times_floor(found.allocated_bytes, floor_bytes)} times that."
    )
    if launches is not None:
        beside += f" An optimizer step takes {launches_in_words(launches)}."
    return (
        f"# {title}\n\n{headline(found)}. {beside}\n\n{markdown_of(_SHARES, _shares(found))}\n\n"
        f"The lines of code that own most of it:\n\n{owners_table(found)}\n"
    )


def attribution_content(found: Attribution, floor_bytes: int, launches: Launches | None) -> dict[str, Any]:
    """What a file says of a run's peak; of a step's launches where somebody counted them."""
    counted = {} if launches is None else {"launches": msgspec.to_builtins(launches)}
    return {"floor_bytes": floor_bytes, **counted, "attribution": msgspec.to_builtins(found)}


def write_attribution(
    folder: Path,
    recipe: Recipe,
    found: Attribution,
    floor_bytes: int,
    record: dict[str, Any],
    launches: Launches | None = None,
) -> None:
    """Write `attribution-NAME` under `folder`: JSON (the source), CSV, the page with its provenance, the picture."""
    name = recipe.name
    rows = [{"kind": kind, "bytes": count} for kind, count in found.kinds.items() if count]
    text, drawn = markdown(found, name, floor_bytes, launches), f"![{name}](attribution-{name}.svg)"
    page = f"{text}\n{drawn}\n\n{provenance_lines(record)}\n"
    content = {"environment": record, "recipe": recipe.to_dict()} | attribution_content(found, floor_bytes, launches)
    write_result(folder, f"attribution-{name}", content, page, rows)
    for kind in ("svg", "png"):
        write_whole(folder / f"attribution-{name}.{kind}", picture_as(kind, found, recipe))


def picture_as(kind: str, found: Attribution, recipe: Recipe) -> bytes:
    """What a file of that kind, `svg` or `png`, holds of the peak by kind and the step's memory over time."""
    said = msgspec.convert(recipe.to_dict(), Said)
    title = _subject(said, found, f"recipe {recipe.name}" if recipe.name else "")
    return as_file(kind, lambda style: picture(style, found), title)


def _subject(said: Said, found: Attribution, name: str = "") -> str:
    return subject(said.model, said.length, name, on=f"{found.device} ({found.provenance})")


@dataclass(frozen=True)
class Explained:
    """A peak, and what its file says of the recipe."""

    attribution: Attribution
    recipe: Said = field(default_factory=Said)
    launches: Launches | None = None

    @property
    def subject(self) -> str:
        """Model, length, card."""
        return _subject(self.recipe, self.attribution)


_Run = tuple[str, Explained]  # with what people call it; empty where its file does not say


@dataclass(frozen=True)
class _File(Explained):
    case: str = ""


def _read(content: Mapping[str, Any]) -> _Run:
    """What `explain --json`, the matrix and a failing test of the gate leave, its kinds summing to its peaks."""
    file = read_as(_File, content)
    _check(file.attribution)
    as_dataclass(Attribution, content["attribution"])  # no field is unknown
    return file.recipe.name or file.case, file


def _provenance(content: Mapping[str, Any]) -> Provenance:
    """A failing test's has only the attribution's own."""
    if "environment" in content:
        return provenance_of(content)
    own = content["attribution"]
    return Provenance(own["provenance"], own["device"], driver="", versions={}, commit="", command="", date="")


def _check(found: Attribution) -> None:
    """What `Attribution` takes on trust."""
    if not (found.reserved_bytes and found.device_bytes and found.allocated_bytes):
        raise ValueError("attribution.allocated_bytes is 0: nothing to explain")
    for owner in found.owners:
        if owner.kind not in KINDS:
            raise ValueError(f"{owner.kind!r} is not a kind of memory")
    line = found.timeline
    whole = all(len(row) == len(line.kinds) for row in line.bytes)
    if not whole or not len(line.bytes) == len(line.events) == len(line.phases):
        raise ValueError("attribution.timeline: every point needs an event, a phase and whole bytes of every kind")
    if len(line.events) < 2 or list(line.events) != sorted(set(line.events)):
        raise ValueError("attribution.timeline.events are not at least two whole numbers that rise")
    if set(line.kinds) - set(KINDS) or not any(map(any, line.bytes)):
        raise ValueError("attribution.timeline has an unknown kind or phase, or no bytes")


def _section(runs: Sequence[_Run]) -> Section:
    """Side by side if there are several, then each."""
    charts = [_compared(runs)] if len(runs) > 1 else []
    for name, found in runs:
        line, title = found.attribution.timeline, f"{name}: a step over time"
        drawn, table = partial(timeline.timeline, line=line), timeline.moments(name, line)
        over_time = Chart(f"timeline-{name}", title, found.subject, timeline.summary(line), drawn, (table,))
        charts += [_breakdown(name, found), over_time]
    return Section(
        name="bytes",
        title="Where the bytes go",
        text="Every byte that the card holds at the peak, by kind: each kind has the same colour in every chart. Kinds "
        "sum to the peak exactly. Allocator slack is reserved and not allocated; the CUDA context is outside of the "
        "allocator.",
        charts=tuple(charts),
        model=model_names(found.recipe.model for _, found in runs),
    )


KIND = Kind(
    "an attribution (explain --json)",
    lambda content: isinstance(content.get("attribution"), dict),
    _read,
    together(_section),
    _provenance,
)


def _compared(told: Sequence[_Run]) -> Chart:
    runs = [(name, found.attribution) for name, found in told]
    parts = ", ".join(f"{name} {gib(found.device_bytes)}" for name, found in runs)
    summary = f"GiB on the card at the peak, on one scale: {parts}."
    rows = []
    for kind, text in KINDS.items():
        if kind == OUTSIDE_ALLOCATED[0]:
            rows.append(_compared_row("allocated", [found.allocated_bytes for _, found in runs], "strong"))
        counts = [found.kinds.get(kind, 0) for _, found in runs]
        if any(counts):
            rows.append(_compared_row(text, counts))
    rows.append(_compared_row("on the card", [found.device_bytes for _, found in runs], "strong"))
    headers = ("kind", *(name for name, _ in runs), *(("difference",) if len(runs) == 2 else ()))
    table = Table("Bytes by kind at the peak, GiB", headers, tuple(rows))
    of = "; ".join(f"{name}: {found.subject}" for name, found in told)
    return Chart("peaks", "Peaks side by side", of, summary, lambda style: peaks(style, runs), (table,))


def _compared_row(text: str, counts: Sequence[int], tone: str = "") -> tuple[Cell, ...]:
    cells = [Cell(text, tone=tone), *(Cell.gib(count, tone) for count in counts)]
    if len(counts) == 2:
        change = counts[1] - counts[0]
        cells.append(Cell(f"{'−' if change < 0 else '+' if change else ''}{gib(abs(change))}", change, tone))
    return tuple(cells)


def _breakdown(name: str, told: Explained) -> Chart:
    found = told.attribution
    largest = sorted(group_bytes(found.kinds), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{group.text} {format_bytes(count)}" for group, count in largest)
    text = f"{headline(found)}. The most: {parts}."
    if told.launches is not None:
        text += f" An optimizer step takes {launches_in_words(told.launches)}."
    tables = [page_table(f"{name}: bytes by kind at the peak", _SHARES, _shares(found))]
    if found.owners:
        caption = f"{name}: the lines of code that own most of the peak"
        tables.append(page_table(caption, _OWNER_COLUMNS, found.owners[:_OWNERS]))
    title = f"{name}: the peak by kind"
    return Chart(f"breakdown-{name}", title, told.subject, text, lambda style: breakdown(style, found), tuple(tables))


def picture(style: Style, attribution: Attribution) -> Figure:
    """The peak as one stacked bar, with what a job can use on the card, above the step over time."""
    figure = style.figure(7.2 if style.narrow else 6.4)
    peak, time = figure.subplots(2, 1, height_ratios=(1, 2.6))
    usable = _usable([attribution])
    scale = max(attribution.device_bytes, *usable, 0)
    peak.set_title(headline(attribution), fontsize=SMALL, loc="left", pad=10, wrap=True)
    _bar(peak, style, attribution, 0, 0.7, scale)
    card = _card_lines(peak, style, usable)
    # Where allocated ends and where the card's bytes end, at two heights, for they may be close.
    marks = ((attribution.allocated_bytes, "allocated", 0.78), (attribution.device_bytes, "on the card", 0.44))
    for count, text, height in marks:
        peak.plot([count / GIB] * 2, [-0.35, height + 0.28], color=style.theme["ink"], linewidth=1)
        ground = {"facecolor": style.theme["paper"], "edgecolor": "none", "pad": 0.5}
        words, place = f"{text} {count / GIB:.2f}", (count / GIB, height)
        note(peak, words, place, (-4, 0), ha="right", va="bottom", bbox=ground)
    peak.set_ylim(-0.4, 1.1)
    peak.set_xlim(0, scale / GIB * 1.01)
    peak.set_yticks([])
    peak.set_xlabel("GiB at the peak")
    style.plain(peak)
    draw_timeline(time, style, attribution.timeline)
    group_legend(figure, style, [group for group, _ in group_bytes(attribution.kinds)], card)
    return figure


def _usable(found: Sequence[Attribution]) -> list[int]:
    """What a job can use on each of their cards, where that is known."""
    sizes = (usable_bytes(attribution.device) for attribution in found)
    return sorted({size for size in sizes if size is not None})


def _card_lines(axes: Axes, style: Style, usable: Sequence[int]) -> list[Artist]:
    """A line where a card ends for a job, through all bars; with its handle for the legend."""
    if not usable:
        return []
    look: dict[str, Any] = {"linestyle": "--", "linewidth": 1.4}
    for size in usable:
        axes.axvline(size / GIB, color=style.theme["limit"], zorder=3, **look)
    sizes = ", ".join(f"{size / GIB:.2f}" for size in usable)
    return [style.stroke(f"usable on the card: {sizes}", color="limit", **look)]


def peaks(style: Style, found: Sequence[tuple[str, Attribution]]) -> Figure:
    """One stacked bar a run, on one scale, what the card holds at the end of each."""
    figure = style.figure(style.row_height * 1.3 * len(found) + (2.6 if style.narrow else 1.7))
    axes = figure.subplots()
    places, height = style.name_rows(axes, [name for name, _ in found])
    usable = _usable([attribution for _, attribution in found])
    largest = max(*(attribution.device_bytes for _, attribution in found), *usable)
    for place, (_, attribution) in zip(places, found, strict=True):
        end = _bar(axes, style, attribution, place, height, largest)
        style.words(axes, f"{end:.2f}", end, place, fontweight="bold", zorder=4)
    card = _card_lines(axes, style, usable)
    axes.set_xlim(0, largest / GIB * (1.2 if style.narrow else 1.1))
    axes.set_xlabel("GiB on the card at the peak")
    style.plain(axes, grid="x")
    present = {group for _, attribution in found for group, _ in group_bytes(attribution.kinds)}
    group_legend(figure, style, [group for group in GROUPS if group in present], card)
    return figure


def breakdown(style: Style, attribution: Attribution) -> Figure:
    """A bar a group, each with its size and its share of what the card holds."""
    rows = group_bytes(attribution.kinds)
    figure = style.figure(style.row_height * len(rows) + 0.6)
    axes = figure.subplots()
    places, height = style.name_rows(axes, [group.text for group, _ in rows])
    for place, (group, count) in zip(places, rows, strict=True):
        axes.barh(place, count / GIB, height=height, **group_fill(style, group))
        share = 100 * count / attribution.device_bytes
        size = f"{count / GIB:.3f}" if count >= GIB // 1000 else "< 0.001"
        style.words(axes, f"{size} ({share:.1f} %)", count / GIB, place)
    axes.set_xlim(0, max(count for _, count in rows) / GIB * (1.5 if style.narrow else 1.22))
    axes.set_xlabel("GiB at the peak, and its share of what the card holds")
    style.plain(axes, grid="x")
    return figure


def _bar(axes: Axes, style: Style, attribution: Attribution, place: float, height: float, scale: int) -> float:
    """One bar, stacked by group, sized where there is room on an axis of `scale` bytes. Returns its end in GiB."""
    left = 0.0
    for group, count in group_bytes(attribution.kinds):
        width = count / GIB
        axes.barh(place, width, left=left, height=height, **group_fill(style, group))
        if count > (0.12 if style.narrow else 0.045) * scale:
            ink = style.theme[f"on-{group.role}"]
            axes.text(left + width / 2, place, f"{width:.2f}", ha="center", va="center", color=ink, fontsize=SMALL)
        left += width
    return left
