"""Predicted against measured by others: published fine-tuning peaks of real cards, and the plan's figure of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from qlora_lowmem.files import Count
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.kinds.prediction import equals, percent_axis, two_panels
from qlora_lowmem.results.reading import Rows, one_of, read_as
from qlora_lowmem.results.style import Axes, Figure, Style, short
from qlora_lowmem.results.subject import subject
from qlora_lowmem.results.tables import Cell, Column, Table, gib, page_table
from qlora_lowmem.units import GIB

# Figure -> what people read, its mark, the role of its colour. A limit is the memory on which a length was the longest.
FIGURES = {
    "allocated": ("allocated", "o", "series-1"),
    "reserved": ("reserved", "s", "series-3"),
    "device": ("on the card", "D", "series-2"),
    "limit": ("longest on that memory", "^", "series-4"),
}
_OUT_OF_MEMORY = "out of memory"  # in the place of a figure: no peak was published, only that a card was too small


@dataclass(frozen=True)
class Published:
    """One figure that others measured, and the plan's, in bytes.

    Attributes:
        measures: a key of `FIGURES`; or `out of memory`, of a card that was too small: `measured_bytes` is its memory.
        explained_bytes: what the measured program holds and a recipe's run does not.
        agrees_with_its_rounding: whether the plan is within the rounding of a figure that was published rounded, or out
            of memory too; None for other rows.
        program_bytes: of the measured program itself, run on the virtual card; None where it is not stated.
    """

    source: str
    run: str
    virtual_card: str
    measures: Annotated[str, one_of((*FIGURES, _OUT_OF_MEMORY))]
    measured_bytes: Count
    measured_versions: str
    plan_bytes: Count
    explained_bytes: Count
    agrees_with_its_rounding: bool | None
    program_bytes: Count | None

    @property
    def is_peak(self) -> bool:
        """Whether a peak was published."""
        return self.measures != _OUT_OF_MEMORY

    @property
    def error(self) -> float:
        """Planned over measured, less 1."""
        return self.plan_bytes / self.measured_bytes - 1

    @property
    def left(self) -> float:
        """The same with the explained bytes added to the plan."""
        return (self.plan_bytes + self.explained_bytes) / self.measured_bytes - 1

    @property
    def program_error(self) -> float | None:
        """The measured program on the virtual card over measured, less 1; None where it is not stated."""
        return None if self.program_bytes is None else self.program_bytes / self.measured_bytes - 1


@dataclass(frozen=True)
class _File:
    rows: Rows[Published]


def _read(content: Mapping[str, Any]) -> tuple[Published, ...]:
    rows = read_as(_File, content).rows
    for row in rows:
        if not (row.measured_bytes and row.plan_bytes):
            raise ValueError(f"rows: a figure of {row.run!r} is 0 bytes")
    if not any(row.is_peak for row in rows):
        raise ValueError("rows: none has a peak")
    return rows


def _section(_provenance: Provenance, rows: tuple[Published, ...]) -> Section:
    points = [row for row in rows if row.is_peak]
    groups = dict.fromkeys(row.source for row in rows)
    chart = Chart(
        "published",
        "Predicted against measured by others",
        subject("the model and length of each run", on=f"{len({row.virtual_card for row in rows})} cards"),
        _summary(rows),
        lambda style: published(style, points),
        tuple(_table(group, [row for row in rows if row.source == group]) for group in groups),
    )
    highlights = []
    if allocated := [point for point in points if point.measures == "allocated"]:
        left, error = _worst(allocated)
        text = f"the worst error of {len(allocated)} allocated peaks that others published, with what is explained"
        highlights.append((f"{left:.1%}", f"{text}; without, {error:.1%}"))
    return Section(
        name="published",
        title="Predicted against measured: what others published",
        text="None of the measured figures is ours: others measured them on real cards and published them. Each run is "
        "written as a recipe and run on a virtual card of the same kind; that peak is what is predicted. Explained are "
        "bytes that the measured program holds, by its description, and a recipe's run does not; unexplained is the "
        "error that is left with them. What a source's are, and where its figures stand, is said in results/reality.md "
        "and bench/reality/README.md.",
        charts=(chart,),
        highlights=tuple(highlights),
        quoted="published figures of real cards, by " + "; ".join(groups),
    )


def _worst(points: Sequence[Published]) -> tuple[float, float]:
    """The largest error with what is explained, and without."""
    return max(abs(point.left) for point in points), max(abs(point.error) for point in points)


def _summary(rows: Sequence[Published]) -> str:
    points = [row for row in rows if row.is_peak]
    texts = [f"{len(points)} published figures against the plan's; on the dashed line both are equal."]
    if explained := sum(point.explained_bytes > 0 for point in points):
        texts.append(f"For {explained} of them a part of the difference is explained: the filled marks have it.")
    for name, (words, *_) in FIGURES.items():
        if found := [point for point in points if point.measures == name]:
            left, error = _worst(found)
            with_it = f", {left:.1%} with what is explained" if any(point.explained_bytes for point in found) else ""
            texts.append(f"Worst error of {len(found)} ({words}): {error:.1%}{with_it}.")
    if rounded := [row.agrees_with_its_rounding for row in rows if row.agrees_with_its_rounding is not None]:
        texts.append(
            f"{sum(rounded)} of {len(rounded)} figures that were published rounded, or as out of memory, agree with "
            "the plan as such."
        )
    return " ".join(texts)


_COLUMNS: tuple[Column[Published], ...] = (
    Column("run", lambda row: Cell(row.run)),
    Column("figure", lambda row: Cell(FIGURES[row.measures][0] if row.is_peak else _OUT_OF_MEMORY)),
    Column(
        "measured by others",
        lambda row: Cell.gib(row.measured_bytes) if row.is_peak else Cell(f"more than {gib(row.measured_bytes)}"),
    ),
    Column("predicted", lambda row: Cell.gib(row.plan_bytes)),
    Column("error", lambda row: _percent(row.error if row.is_peak else None)),
    Column(
        "explained",
        lambda row: Cell.gib(row.explained_bytes) if row.is_peak and row.explained_bytes else Cell("-"),
    ),
    Column("unexplained", lambda row: _percent(row.left if row.is_peak else None)),
)
_AGREES = {None: Cell("-"), True: Cell("agrees", tone="good"), False: Cell("does not agree", tone="bad")}
_WHERE_THERE: tuple[Column[Published], ...] = (
    Column("as published", lambda row: _AGREES[row.agrees_with_its_rounding]),
    Column("the program itself", lambda row: _percent(row.program_error)),
)
_CARD = Column[Published]("virtual card", lambda row: Cell(row.virtual_card))
_VERSIONS = Column[Published]("versions", lambda row: Cell(row.measured_versions or "not stated"))


def _table(source: str, rows: Sequence[Published]) -> Table:
    there = [column for column in _WHERE_THERE if any(column.cell(row).text != "-" for row in rows)]
    versions = len({row.measured_versions for row in rows}) > 1
    said = "" if versions else f" Versions: {rows[0].measured_versions or 'not stated'}."
    columns = [*_COLUMNS, *there, _CARD, *((_VERSIONS,) if versions else ())]
    return page_table(f"{source}, GiB.{said}", columns, rows)


def _percent(share: float | None) -> Cell:
    return Cell("-") if share is None else Cell.ratio(f"{share:+.2%}", share)


KIND = Kind(
    "published peaks (pytest bench/test_reality.py)",
    has_rows("rows", "plan_bytes", "measured_bytes", "explained_bytes"),
    _read,
    each_its_own(_section),
)


def published(style: Style, points: Sequence[Published]) -> Figure:
    """Two panels of one point at least; hollow is the plan, filled the plan with what is explained."""
    by_source = {each.source: [point for point in points if point.source == each.source] for each in points}
    rows = 1.2 * style.row_height * sum(map(_tall, by_source.values()))
    figure, scatter, errors = two_panels(style, rows, rows + 5.6 if style.narrow else max(rows + 1.6, 4.2))
    equals(scatter, style, [size / GIB for point in points for size in (point.plan_bytes, point.measured_bytes)])
    scatter.set_xlabel("measured by others, GiB")
    scatter.set_ylabel("predicted GiB")
    for point in points:
        x, y = point.measured_bytes / GIB, point.plan_bytes / GIB
        explained = (point.plan_bytes + point.explained_bytes) / GIB
        colour = style.theme[FIGURES[point.measures][2]]
        scatter.plot([x, x], [y, explained], color=colour, linewidth=1)
        _mark(scatter, style, point, x, y, filled=False)
        if point.explained_bytes:
            _mark(scatter, style, point, x, explained, filled=True)
    _errors(errors, style, by_source)
    handles = [
        style.stroke(text, linestyle="none", marker=marker, color=role, markerfacecolor="none")
        for name, (text, marker, role) in FIGURES.items()
        if any(point.measures == name for point in points)
    ]
    if any(point.explained_bytes for point in points):
        handles.append(style.stroke("filled: with what is explained", linestyle="none", marker="o", color="ink"))
    style.legend(figure, handles, 2 if style.narrow else len(handles), columnspacing=1.2)
    return figure


def _mark(axes: Axes, style: Style, point: Published, x: float, y: float, filled: bool) -> None:
    _, marker, role = FIGURES[point.measures]
    axes.plot(x, y, markersize=4 if filled else 5.5, **style.mark(marker, role, role if filled else "none", 1.2))


def _errors(axes: Axes, style: Style, by_source: Mapping[str, Sequence[Published]]) -> None:
    axes.axvline(0, color=style.theme["edge"], linewidth=1, linestyle="--")
    top, middles, errors = 0.0, [], [0.0]
    for source, found in by_source.items():
        if style.narrow:
            style.name_at(axes, source, top + 0.14)
        first = top + (0.42 if style.narrow else 0.15)
        top += _tall(found)
        last = top - 0.15
        middles.append((first + last) / 2)
        for number, point in enumerate(found):  # one below the other, in the file's order
            ends = [100 * point.error, 100 * point.left]
            errors += ends
            y = first + (last - first) * (number + 0.5) / len(found)
            if point.explained_bytes:
                axes.plot(ends, [y, y], color=style.theme["grid"], linewidth=0.8, zorder=1)
                _mark(axes, style, point, 100 * point.left, y, filled=True)
            _mark(axes, style, point, 100 * point.error, y, filled=False)
    axes.set_ylim(top, -0.1)
    axes.set_yticks([] if style.narrow else middles, [] if style.narrow else [short(source) for source in by_source])
    axes.tick_params(axis="y", length=0, labelsize=9)
    room = 0.06 * (max(errors) - min(errors)) + 0.5
    axes.set_xlim(min(errors) - room, max(errors) + room)
    percent_axis(axes)
    axes.locator_params(axis="x", nbins=6)
    style.plain(axes, grid="x")


def _tall(found: Sequence[Published]) -> float:
    """How many rows a source takes: an eighth of one for each of its figures, one at least."""
    return max(1.0, len(found) / 8)
