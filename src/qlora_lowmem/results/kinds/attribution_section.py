"""Where the bytes of a peak are, run by run and side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.files import as_dataclass
from qlora_lowmem.memory.attribution import Attribution, chosen_events
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.attribution import breakdown, group_bytes, peaks, timeline
from qlora_lowmem.results.tables import Cell, Table, count_cell, gib, gib_cell, ratio_cell
from qlora_lowmem.results.theme import GROUPS
from qlora_lowmem.units import MIB, format_bytes

_OWNERS = 12
_MOMENTS = 24  # of a timeline's table


@dataclass(frozen=True)
class Run:
    """An attribution and what people call its run; empty where its file does not say."""

    name: str
    found: Attribution


def recognises(content: dict[str, Any]) -> bool:
    """What `explain --json`, the matrix and a failing test of the gate leave."""
    return isinstance(content.get("attribution"), dict)


def read(content: Fields) -> tuple[Provenance, Run]:
    """The attribution of a file, its kinds summing to its peaks.

    Raises:
        ValueError, KeyError, TypeError: what is wrong with it.
    """
    inside = content.object("attribution")
    _check(inside)
    found = as_dataclass(Attribution, inside.raw)
    named = content.raw.get("recipe", content.raw.get("case"))
    name = named.get("name") if isinstance(named, dict) else named
    provenance = provenance_of(content) if "environment" in content.raw else Provenance(found.provenance, found.device)
    return provenance, Run(name if isinstance(name, str) else "", found)


def _check(inside: Fields) -> None:
    """What `Attribution` takes on trust."""
    for name in ("device", "provenance", "phase", "moment"):
        inside.text(name)
    for name in ("kinds", "modules"):
        inside.object(name).counts()
    for name in ("allocated_bytes", "reserved_bytes", "device_bytes"):
        inside.count(name)
    if not inside["allocated_bytes"]:
        raise ValueError("attribution.allocated_bytes is 0: nothing to explain")
    for owner in inside.objects("owners") if inside["owners"] else ():
        for name in ("kind", "line", "module", "layout"):
            owner.text(name)
        if owner["kind"] not in KINDS:
            raise ValueError(f"{owner['kind']!r} is not a kind of memory")
        owner.count("bytes")
        owner.count("blocks")
    line = inside.object("timeline")
    events, phases, rows, kinds = line["events"], line["phases"], line["bytes"], line["kinds"]
    width = len(kinds)
    whole = all(type(number) is int and number >= 0 for row in rows for number in row)
    if not (whole and all(len(row) == width for row in rows) and len(rows) == len(events) == len(phases)):
        raise ValueError("attribution.timeline: every point needs an event, a phase and whole bytes of every kind")
    if len(events) < 2 or any(type(event) is not int for event in events) or list(events) != sorted(set(events)):
        raise ValueError("attribution.timeline.events are not at least two whole numbers that rise")
    if any(type(name) is not str for name in (*phases, *kinds)) or set(kinds) - set(KINDS) or not any(map(any, rows)):
        raise ValueError("attribution.timeline has an unknown kind or phase, or no bytes")


def sections(found: Sequence[tuple[Source, Run]]) -> list[Section]:
    """One section for all runs: side by side if there are several, then each."""
    runs = _distinct(found)
    charts = [_compared(runs)] if len(runs) > 1 else []
    for run in runs:
        charts += [_breakdown(run), _timeline(run)]
    return [
        Section(
            name="bytes",
            title="Where the bytes go",
            text="Every byte that the card holds at the peak, by kind: each kind has the same colour in every chart. "
            "Kinds sum to the peak exactly. Allocator slack is reserved and not allocated; the CUDA context is "
            "outside of the allocator.",
            sources=tuple(source for source, _ in found),
            charts=tuple(charts),
        )
    ]


def _distinct(found: Sequence[tuple[Source, Run]]) -> list[Run]:
    """Runs of one name get their file's behind it; those of none get it for a name."""
    names = [run.name for _, run in found]
    runs = []
    for source, run in found:
        stem = str(Path(source.file).with_suffix(""))
        name = stem if not run.name else f"{run.name} ({stem})" if names.count(run.name) > 1 else run.name
        runs.append(Run(name, run.found))
    return runs


def _compared(runs: Sequence[Run]) -> Chart:
    parts = ", ".join(f"{run.name} {gib(run.found.device_bytes)}" for run in runs)
    return Chart(
        "peaks",
        "Peaks side by side",
        f"GiB on the card at the peak, on one scale: {parts}.",
        lambda style: peaks(style, [(run.name, run.found) for run in runs]),
        (_comparison(runs),),
    )


def _comparison(runs: Sequence[Run]) -> Table:
    two = len(runs) == 2
    rows = []
    for kind, text in KINDS.items():
        if kind == OUTSIDE_ALLOCATED[0]:
            rows.append(_compared_row("allocated", [run.found.allocated_bytes for run in runs], "strong"))
        counts = [run.found.kinds.get(kind, 0) for run in runs]
        if any(counts):
            rows.append(_compared_row(text, counts))
    rows.append(_compared_row("on the card", [run.found.device_bytes for run in runs], "strong"))
    headers = ("kind", *(run.name for run in runs), *(("difference",) if two else ()))
    return Table("Bytes by kind at the peak, GiB", headers, tuple(rows))


def _compared_row(text: str, counts: Sequence[int], tone: str = "") -> tuple[Cell, ...]:
    cells = [gib_cell(count, tone) for count in counts]
    if len(counts) == 2:
        change = counts[1] - counts[0]
        cells.append(Cell(f"{'−' if change < 0 else '+' if change else ''}{gib(abs(change))}", change, tone))
    return (Cell(text, tone=tone), *cells)


def _breakdown(run: Run) -> Chart:
    found = run.found
    largest = sorted(group_bytes(found.kinds), key=lambda pair: -pair[1])[:3]
    parts = ", ".join(f"{group.text} {format_bytes(count)}" for group, count in largest)
    summary = (
        f"{found.device} ({found.provenance}): {format_bytes(found.allocated_bytes)} allocated, "
        f"{format_bytes(found.device_bytes)} on the card. The {found.phase} peak comes in {found.moment}. "
        f"The most: {parts}."
    )
    tables = (_kinds(run), _owners(run))
    return Chart(
        f"breakdown-{run.name}",
        f"{run.name}: the peak by kind",
        summary,
        lambda style: breakdown(style, found),
        tables if found.owners else tables[:1],
    )


def _kinds(run: Run) -> Table:
    found, rows = run.found, []
    for kind, text in KINDS.items():
        if kind == OUTSIDE_ALLOCATED[0]:
            rows.append(_share("allocated", found.allocated_bytes, found.device_bytes, "strong"))
        if kind in found.kinds:
            rows.append(_share(text, found.kinds[kind], found.device_bytes))
    rows.append(_share("on the card", found.device_bytes, found.device_bytes, "strong"))
    return Table(f"{run.name}: bytes by kind at the peak", ("kind", "bytes", "GiB", "share"), tuple(rows))


def _share(text: str, count: int, total: int, tone: str = "") -> tuple[Cell, ...]:
    share = ratio_cell(f"{100 * count / total:.1f} %", count / total, tone)
    return (Cell(text, tone=tone), Cell(f"{count:,}", count, tone), gib_cell(count, tone), share)


def _owners(run: Run) -> Table:
    rows = tuple(
        (
            Cell(owner.line),
            Cell(KINDS[owner.kind]),
            Cell(f"{owner.module} {owner.layout}".strip()),
            count_cell(owner.blocks),
            Cell(f"{owner.bytes / MIB:,.2f}", owner.bytes),
        )
        for owner in run.found.owners[:_OWNERS]
    )
    headers = ("line of code", "kind", "largest for", "blocks", "MiB")
    return Table(f"{run.name}: the lines of code that own most of the peak", headers, rows)


def _timeline(run: Run) -> Chart:
    line = run.found.timeline
    sums = [sum(row) for row in line.bytes]
    top = max(range(len(sums)), key=sums.__getitem__)
    summary = (
        f"Allocated bytes over the allocations and frees of the micro-batch in which the peak comes: from "
        f"{gib(sums[0])} GiB to a peak of {gib(sums[top])} GiB at event {line.events[top]:,} of {line.events[-1]:,}"
        f"{f' ({line.phases[top]})' if line.phases[top] else ''}, and {gib(sums[-1])} GiB at the end."
    )
    return Chart(
        f"timeline-{run.name}",
        f"{run.name}: a step over time",
        summary,
        lambda style: timeline(style, run.found),
        (_moments(run),),
    )


def _moments(run: Run) -> Table:
    line = run.found.timeline
    columns = [(group, [index for index, kind in enumerate(line.kinds) if kind in group.kinds]) for group in GROUPS]
    columns = [
        (group, indexes) for group, indexes in columns if any(row[index] for row in line.bytes for index in indexes)
    ]
    rows = tuple(
        (
            Cell(f"{line.events[point]:,}", line.events[point]),
            Cell(line.phases[point] or "before"),
            gib_cell(sum(line.bytes[point]), "strong"),
            *(gib_cell(sum(line.bytes[point][index] for index in indexes)) for _, indexes in columns),
        )
        for point in chosen_events([sum(row) for row in line.bytes], _MOMENTS)
    )
    headers = ("event", "phase", "allocated", *(group.text for group, _ in columns))
    caption = f"{run.name}: GiB by group at {len(rows)} of the {len(line.events)} points drawn, the peak among them"
    return Table(caption, headers, rows)
