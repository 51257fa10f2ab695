"""Where a peak's bytes are: stacked bars on one scale, a bar a group, and a step's memory over its allocations."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_lowmem.memory.attribution import Attribution, Timeline, chosen_events
from qlora_lowmem.results.style import SMALL, Style, name_rows, plain, row_height, words_behind
from qlora_lowmem.results.svg import CRISP
from qlora_lowmem.results.theme import GROUPS, Group
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHED = "slack"  # reserved, and nobody's
_POINTS = {False: 400, True: 150}  # of a timeline, by narrow: about one to a column of pixels or two


def group_bytes(kinds: Mapping[str, int]) -> list[tuple[Group, int]]:
    """The groups that have bytes, bottom to top, each with the sum of its kinds."""
    sums = [(group, sum(kinds.get(kind, 0) for kind in group.kinds)) for group in GROUPS]
    return [(group, count) for group, count in sums if count]


def picture(style: Style, attribution: Attribution, title: str, headline: str) -> "Figure":
    """The peak as one stacked bar above the step over time."""
    figure = style.figure(7.2 if style.narrow else 6.4)
    peak, time = figure.subplots(2, 1, height_ratios=(1, 2.6))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    peak.set_title(headline, fontsize=SMALL, loc="left", pad=10, wrap=True)
    _bar(peak, style, attribution, 0, 0.7, attribution.device_bytes)
    _marks(peak, style, attribution)
    _draw_timeline(time, style, attribution.timeline)
    _legend(figure, style, [group for group, _ in group_bytes(attribution.kinds)])
    return figure


def peaks(style: Style, found: Sequence[tuple[str, Attribution]]) -> "Figure":
    """One stacked bar a run, on one scale, what the card holds at the end of each."""
    figure = style.figure(row_height(style) * 1.3 * len(found) + (2.6 if style.narrow else 1.7))
    axes = figure.subplots()
    places, height = name_rows(axes, [name for name, _ in found], style)
    largest = max(attribution.device_bytes for _, attribution in found)
    for place, (_, attribution) in zip(places, found, strict=True):
        end = _bar(axes, style, attribution, place, height, largest)
        words_behind(axes, f"{end:.2f}", end, place, fontweight="bold")
    axes.set_xlim(0, largest / GIB * (1.2 if style.narrow else 1.1))
    axes.set_xlabel("GiB on the card at the peak")
    plain(axes, style, grid="x")
    present = {group for _, attribution in found for group, _ in group_bytes(attribution.kinds)}
    _legend(figure, style, [group for group in GROUPS if group in present])
    return figure


def breakdown(style: Style, attribution: Attribution) -> "Figure":
    """A bar a group, each with its size and its share of what the card holds."""
    rows = group_bytes(attribution.kinds)
    figure = style.figure(row_height(style) * len(rows) + 0.6)
    axes = figure.subplots()
    places, height = name_rows(axes, [group.text for group, _ in rows], style)
    for place, (group, count) in zip(places, rows, strict=True):
        _part(axes, style, group, place, 0.0, count / GIB, height)
        share = 100 * count / attribution.device_bytes
        size = f"{count / GIB:.3f}" if count >= GIB // 1000 else "< 0.001"
        words_behind(axes, f"{size} ({share:.1f} %)", count / GIB, place)
    axes.set_xlim(0, max(count for _, count in rows) / GIB * (1.5 if style.narrow else 1.22))
    axes.set_xlabel("GiB at the peak, and its share of what the card holds")
    plain(axes, style, grid="x")
    return figure


def timeline(style: Style, attribution: Attribution) -> "Figure":
    """Allocated bytes by group over the allocations and frees of the recorded step."""
    figure = style.figure(4.9 if style.narrow else 4.6)
    axes = figure.subplots()
    _draw_timeline(axes, style, attribution.timeline)
    present = {group for group, layer in _layers(attribution.timeline) if any(layer)}
    _legend(figure, style, [group for group in GROUPS if group in present])
    return figure


def _bar(axes: "Axes", style: Style, attribution: Attribution, place: float, height: float, scale: int) -> float:
    """One bar, stacked by group, sized in its parts where they have room on an axis of `scale` bytes.

    Returns:
        its end in GiB.
    """
    left = 0.0
    for group, count in group_bytes(attribution.kinds):
        width = count / GIB
        _part(axes, style, group, place, left, width, height)
        if count > (0.12 if style.narrow else 0.055) * scale:
            ink = style.theme[f"on-{group.role}"]
            axes.text(left + width / 2, place, f"{width:.2f}", ha="center", va="center", color=ink, fontsize=SMALL)
        left += width
    return left


def _part(axes: "Axes", style: Style, group: Group, place: float, left: float, width: float, height: float) -> None:
    axes.barh(place, width, left=left, height=height, **_fill(style, group))


def _fill(style: Style, group: Group) -> dict[str, Any]:
    """Colour and outline: light colours have an edge that shows on paper."""
    hatch = "///" if group.role == _HATCHED else None
    return {"facecolor": style.theme[group.role], "edgecolor": style.theme["edge"], "linewidth": 0.6, "hatch": hatch}


def _marks(axes: "Axes", style: Style, attribution: Attribution) -> None:
    """Where allocated ends and where the card's bytes end, at two heights, for they may be close."""
    marks = ((attribution.allocated_bytes, "allocated", 0.78), (attribution.device_bytes, "on the card", 0.44))
    for count, text, height in marks:
        axes.plot([count / GIB] * 2, [-0.35, height + 0.28], color=style.theme["ink"], linewidth=1)
        axes.annotate(
            f"{text} {count / GIB:.2f}",
            (count / GIB, height),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=SMALL,
            bbox={"facecolor": style.theme["paper"], "edgecolor": "none", "pad": 0.5},
        )
    axes.set_ylim(-0.4, 1.1)
    axes.set_xlim(0, attribution.device_bytes / GIB * 1.005)
    axes.set_yticks([])
    axes.set_xlabel("GiB at the peak")
    plain(axes, style)


def _layers(found: Timeline) -> list[tuple[Group, list[int]]]:
    """Bytes of each group at each point, for the groups whose kinds occur."""
    layers = []
    for group in GROUPS:
        columns = [index for index, kind in enumerate(found.kinds) if kind in group.kinds]
        if columns:
            layers.append((group, [sum(row[index] for index in columns) for row in found.bytes]))
    return layers


def _draw_timeline(axes: "Axes", style: Style, found: Timeline) -> None:
    sums = [sum(row) for row in found.bytes]
    points = chosen_events(sums, _POINTS[style.narrow])
    edges = [*(found.events[point] for point in points), found.events[points[-1]] + 1]
    tops, stack = [0.0] * len(points), []
    for group, layer in _layers(found):
        tops = [top + layer[point] / GIB for top, point in zip(tops, points, strict=True)]
        stack.append((group, tops))
    for number, (group, top) in enumerate(reversed(stack)):  # each covers what is under its top, so the lowest is last
        layer_of = axes.stairs(top, edges, fill=True, facecolor=style.theme[group.role], linewidth=0, antialiased=False)
        layer_of.set_gid(f"{CRISP}-{number}")
    axes.set_ylim(0, max(sums) / GIB * 1.2)
    axes.set_xlim(edges[0], edges[-1])
    _mark_peak(axes, style, found, sums)
    _mark_turn(axes, style, found)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4 if style.narrow else 8)
    axes.set_ylabel("allocated GiB")
    axes.set_xlabel("allocations and frees, in order" if style.narrow else _EVENTS)
    plain(axes, style, keep=("bottom", "left"))


_EVENTS = "allocations and frees of the micro-batch in which the peak comes, in order"


def _mark_peak(axes: "Axes", style: Style, found: Timeline, sums: Sequence[int]) -> None:
    top = max(range(len(sums)), key=sums.__getitem__)
    event, height = found.events[top], sums[top] / GIB
    late = event - found.events[0] > 0.6 * (found.events[-1] - found.events[0])
    axes.plot(event, height, marker="v", color=style.theme["ink"], markersize=6, clip_on=False)
    axes.annotate(
        f"peak {height:.2f} GiB",
        (event, height),
        xytext=(-7 if late else 7, 4),
        textcoords="offset points",
        ha="right" if late else "left",
        fontsize=SMALL,
    )


def _mark_turn(axes: "Axes", style: Style, found: Timeline) -> None:
    """A line where forward turns into backward."""
    after = ("backward", "recompute")
    turn = next((e for e, phase in zip(found.events, found.phases, strict=True) if phase in after), None)
    if turn is None:
        return
    axes.axvline(turn, color=style.theme["ink"], linewidth=0.8, linestyle=(0, (3, 3)))
    behind = "backward, layers recomputed" if "recompute" in found.phases else "backward"
    share = (turn - found.events[0]) / (found.events[-1] - found.events[0])
    # Where one side has no room for its word, the other side's says enough.
    for text, side, away, room in (("forward", "right", -4, share > 0.2), (behind, "left", 4, share < 0.6)):
        if room:
            axes.annotate(
                text,
                (turn, 0.99),
                xycoords=("data", "axes fraction"),
                xytext=(away, 0),
                textcoords="offset points",
                ha=side,
                va="top",
                fontsize=SMALL,
            )


def _legend(figure: "Figure", style: Style, groups: Sequence[Group]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=group.brief if style.narrow else group.text, **_fill(style, group)) for group in groups]
    columns = 2 if style.narrow else 4
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        columnspacing=1.0 if style.narrow else 2.0,
        handlelength=1.3,
    )
