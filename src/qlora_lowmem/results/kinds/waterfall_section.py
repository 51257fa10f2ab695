"""The waterfall: from the baseline to lean, one idea a step."""

from collections.abc import Sequence
from typing import Any

from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.waterfall import Step, waterfall
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Table, gib, gib_cell, times_floor_cell, usable_bytes
from qlora_lowmem.units import GIB


def recognises(content: dict[str, Any]) -> bool:
    """A list of cases, each an idea."""
    cases = content.get("cases")
    return isinstance(cases, list) and any(isinstance(case, dict) and "idea" in case for case in cases)


def read(content: Fields) -> tuple[Provenance, tuple[Step, ...]]:
    """The steps of a `waterfall.json`."""
    steps = tuple(
        Step(
            case.text("idea"),
            case.count("peak_allocated_bytes"),
            case.count("peak_device_bytes"),
            case.count("floor_bytes"),
        )
        for case in content.objects("cases")
    )
    for number, step in enumerate(steps):
        if not (step.peak_allocated_bytes and step.peak_device_bytes and step.floor_bytes):
            raise ValueError(f"cases[{number}] has a peak or a floor of 0 bytes")
    return provenance_of(content), steps


def sections(found: Sequence[tuple[Source, tuple[Step, ...]]]) -> list[Section]:
    """One section a file."""
    return [_section(source, steps, len(found) > 1) for source, steps in found]


def _section(source: Source, steps: tuple[Step, ...], several: bool) -> Section:
    device = source.provenance.device
    usable = usable_bytes(device)
    first, last = steps[0], steps[-1]
    times = first.peak_allocated_bytes / last.peak_allocated_bytes
    summary = (
        f"The allocated peak goes from {gib(first.peak_allocated_bytes)} GiB ({first.idea}) to "
        f"{gib(last.peak_allocated_bytes)} GiB ({last.idea}) in {len(steps) - 1} steps, {times:.1f} times less."
    )
    fitting = next((step for step in steps if usable is not None and step.peak_device_bytes <= usable), None)
    if fitting is not None and usable is not None:
        summary += (
            f" With {fitting.idea} it holds {gib(fitting.peak_device_bytes)} GiB on the card, CUDA context included, "
            f"and fits into the {gib(usable)} GiB that a job can use there."
        )
    chart = Chart(
        "waterfall",
        "Peak after each idea",
        summary,
        lambda style: waterfall(style, steps, usable),
        (_table(steps),),
    )
    return Section(
        name="waterfall",
        title=f"From the baseline to lean{f', {device}' if several else ''}",
        text="One idea more a row. A bar's first part is what is left allocated at the peak, its second what the idea "
        f"saved. {FLOOR_TEXT} The ring is what the card holds, with the allocator's slack and the CUDA context.",
        sources=(source,),
        charts=(chart,),
        highlights=(
            (f"{_short(first)} → {_short(last)} GiB", f"allocated peak, from “{first.idea}” to “{last.idea}”"),
        ),
    )


def _short(step: Step) -> str:
    return f"{step.peak_allocated_bytes / GIB:.2f}"


def _table(steps: tuple[Step, ...]) -> Table:
    rows, before = [], 0
    for step in steps:
        rows.append(
            (
                Cell(step.idea),
                gib_cell(step.peak_allocated_bytes),
                gib_cell(before - step.peak_allocated_bytes) if before else Cell("-"),
                gib_cell(step.peak_device_bytes),
                gib_cell(step.floor_bytes),
                times_floor_cell(step.peak_allocated_bytes, step.floor_bytes),
            )
        )
        before = step.peak_allocated_bytes
    headers = ("idea", "allocated", "saves", "on the card", "floor", "× floor")
    return Table("Peaks in GiB after each idea", headers, tuple(rows))
