"""A step's memory over its allocations and frees: the drawing, and its figures at a few moments."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lowmem.memory.attribution import Timeline, chosen_events
from qlora_lowmem.results.style import CRISP, GROUPS, SMALL, Artist, Axes, Figure, Group, Style, note
from qlora_lowmem.results.tables import Cell, Table, gib
from qlora_lowmem.units import GIB

_POINTS = {False: 400, True: 150}  # by narrow: about one to a column of pixels or two
_MOMENTS = 24  # of the table


def group_bytes(kinds: Mapping[str, int]) -> list[tuple[Group, int]]:
    """The groups that have bytes, bottom to top, each with the sum of its kinds."""
    sums = [(group, sum(kinds.get(kind, 0) for kind in group.kinds)) for group in GROUPS]
    return [(group, count) for group, count in sums if count]


def _layers(line: Timeline) -> list[tuple[Group, list[int]]]:
    """Bytes of each group at each point, for the groups whose kinds occur."""
    columns = [(group, [i for i, kind in enumerate(line.kinds) if kind in group.kinds]) for group in GROUPS]
    return [(group, [sum(row[i] for i in found) for row in line.bytes]) for group, found in columns if found]


def moments(name: str, line: Timeline) -> Table:
    """Bytes by group at a few of the points, the peak among them; `name` is the run's."""
    layers = [(group, layer) for group, layer in _layers(line) if any(layer)]
    sums = [sum(row) for row in line.bytes]
    rows = tuple(
        (
            Cell(f"{line.events[point]:,}", line.events[point]),
            Cell(line.phases[point] or "before"),
            Cell.gib(sums[point], "strong"),
            *(Cell.gib(layer[point]) for _, layer in layers),
        )
        for point in chosen_events(sums, _MOMENTS)
    )
    headers = ("event", "phase", "allocated", *(group.text for group, _ in layers))
    caption = f"{name}: GiB by group at {len(rows)} of the {len(line.events)} points drawn, the peak among them"
    return Table(caption, headers, rows)


def summary(line: Timeline) -> str:
    """From where to where it goes, and where its peak is."""
    sums = [sum(row) for row in line.bytes]
    top = sums.index(max(sums))
    return (
        f"Allocated bytes over the allocations and frees of the micro-batch in which the peak comes: from "
        f"{gib(sums[0])} GiB to a peak of {gib(sums[top])} GiB at event {line.events[top]:,} of {line.events[-1]:,}"
        f"{f' ({line.phases[top]})' if line.phases[top] else ''}, and {gib(sums[-1])} GiB at the end."
    )


def timeline(style: Style, line: Timeline) -> Figure:
    """Allocated bytes by group over the allocations and frees of the recorded step."""
    figure = style.figure(4.9 if style.narrow else 4.6)
    draw_timeline(figure.subplots(), style, line)
    group_legend(figure, style, [group for group, layer in _layers(line) if any(layer)])
    return figure


def draw_timeline(axes: Axes, style: Style, line: Timeline) -> None:
    """Stacked by group, with the peak and the turn from forward to backward marked."""
    sums = [sum(row) for row in line.bytes]
    points = chosen_events(sums, _POINTS[style.narrow])
    edges = [*(line.events[point] for point in points), line.events[points[-1]] + 1]
    tops, stack = [0.0] * len(points), []
    for group, layer in _layers(line):
        tops = [top + layer[point] / GIB for top, point in zip(tops, points, strict=True)]
        stack.append((group, tops))
    for number, (group, top) in enumerate(reversed(stack)):  # each covers what is under its top, so the lowest is last
        layer_of = axes.stairs(top, edges, fill=True, facecolor=style.theme[group.role], linewidth=0, antialiased=False)
        layer_of.set_gid(f"{CRISP}-{number}")
    axes.set_ylim(0, max(sums) / GIB * 1.2)
    axes.set_xlim(edges[0], edges[-1])
    peak = sums.index(max(sums))
    event, height = line.events[peak], sums[peak] / GIB
    axes.plot(event, height, marker="v", color=style.theme["ink"], markersize=6, clip_on=False)
    late = event - line.events[0] > 0.6 * (line.events[-1] - line.events[0])
    side, away = ("right", -7) if late else ("left", 7)
    note(axes, f"peak {height:.2f} GiB", (event, height), (away, 4), ha=side)
    _mark_turn(axes, style, line)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4 if style.narrow else 8)
    axes.set_ylabel("allocated GiB")
    of = "" if style.narrow else " of the micro-batch in which the peak comes"
    axes.set_xlabel(f"allocations and frees{of}, in order")
    style.plain(axes, keep=("bottom", "left"))


def _mark_turn(axes: Axes, style: Style, line: Timeline) -> None:
    """A line where forward turns into backward."""
    after = ("backward", "recompute")
    turn = next((e for e, phase in zip(line.events, line.phases, strict=True) if phase in after), None)
    if turn is None:
        return
    axes.axvline(turn, color=style.theme["ink"], linewidth=0.8, linestyle=(0, (3, 3)))
    behind = "backward, layers recomputed" if "recompute" in line.phases else "backward"
    share = (turn - line.events[0]) / (line.events[-1] - line.events[0])
    # Where one side has no room for its word, the other side's says enough.
    for text, side, away, room in (("forward", "right", -4, share > 0.2), (behind, "left", 4, share < 0.6)):
        if room:
            note(axes, text, (turn, 0.99), (away, 0), xycoords=("data", "axes fraction"), ha=side, va="top")


def group_fill(style: Style, group: Group) -> dict[str, Any]:
    """Colour and outline: light colours have an edge that shows on paper."""
    hatch = "///" if group.role == "slack" else None  # reserved, and nobody's
    return {"facecolor": style.theme[group.role], "edgecolor": style.theme["edge"], "linewidth": 0.6, "hatch": hatch}


def group_legend(figure: Figure, style: Style, groups: Sequence[Group], others: Sequence[Artist] = ()) -> None:
    """Below the drawing, a patch a group, and other handles."""
    handles = [style.patch(group.brief if style.narrow else group.text, **group_fill(style, group)) for group in groups]
    handles += others
    columns, spacing = (2, 1.0) if style.narrow else (4, 2.0)
    style.legend(figure, handles, columns, fontsize=SMALL, columnspacing=spacing, handlelength=1.3)
