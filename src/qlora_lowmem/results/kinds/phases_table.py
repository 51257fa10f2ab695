"""Peaks by phase as plain data and as files: one layout, whichever command or benchmark wrote it; the page reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lowmem.memory.profile import PHASES, Peak
from qlora_lowmem.results.kinds.phases import PhaseBytes
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    gib,
    known_gib,
    markdown_table,
    provenance_lines,
    times_floor,
    write_result,
)

Lives = Mapping[str, Sequence[PhaseBytes]]  # the phases of each recipe

_HEADINGS = ("recipe", "phase", "allocated", "budget", "reserved", "on the card", "budget on the card")
_FLOOR_HEADINGS = ("recipe", "highest in", "allocated", "floor", "x floor")

# The sizes of a row, in the order of their headings.
_SIZES = (
    "allocated_bytes",
    "allocated_budget_bytes",
    "reserved_bytes",
    "device_bytes",
    "device_budget_bytes",
)


def phase_bytes(
    phases: Mapping[str, Peak],
    device_budget: int,
    allocated_budgets: Mapping[str, int] | None = None,
    out_of_memory: Mapping[str, str] | None = None,
    floor: int = 0,
) -> tuple[PhaseBytes, ...]:
    """The phases of a profile beside their budgets, in bytes and in the order of a run's life.

    Args:
        device_budget: what the card may hold in every phase.
        allocated_budgets: what tensors may take, by phase; None where nobody set budgets.
        out_of_memory: torch's message by the phase in which memory ran out. A phase that has no readings gets zeros; a
            moment that is no phase (between two of them) counts to the last phase with readings.
        floor: what no method of training the recipe avoids; 0 where no step ended.
    """
    peaks = dict(phases)
    messages = {}
    for name, message in (out_of_memory or {}).items():
        phase = name if name in PHASES else list(phases)[-1] if phases else PHASES[0]
        messages[phase] = message or "out of memory"
        peaks.setdefault(phase, Peak())
    return tuple(
        PhaseBytes(
            name,
            peaks[name].allocated,
            allocated_budgets[name] if allocated_budgets is not None else None,
            peaks[name].reserved,
            peaks[name].device,
            device_budget,
            floor,
            messages.get(name, ""),
        )
        for name in PHASES
        if name in peaks
    )


def highest(life: Sequence[PhaseBytes]) -> PhaseBytes:
    """The phase in which tensors take most, the first of those with the same: what is held against the floor."""
    return max(life, key=lambda each: each.allocated)


def phases_content(lives: Lives, record: dict[str, Any]) -> dict[str, Any]:
    """What `phases.json` and `qlora_lowmem.phases --json` hold; `record` is the figures' provenance."""
    return {"environment": record, "cases": _rows(lives)}


def write_phases(folder: Path, lives: Lives, record: dict[str, Any], about: str) -> None:
    """Write `phases` as JSON, Markdown and CSV; `about` says what ran."""
    rows = _rows(lives)
    cells = [
        [
            str(row["recipe"]),
            str(row["phase"]),
            *("-" if row[key] is None else gib(row[key]) for key in _SIZES),
        ]
        for row in rows
    ]
    tops = [(recipe, highest(life)) for recipe, life in lives.items()]
    floors = [
        [recipe, top.phase, gib(top.allocated), known_gib(top.floor), times_floor(top.allocated, top.floor)]
        for recipe, top in tops
    ]
    ran_out = "".join(
        f"- {row['recipe']}, {row['phase']}: {row['out_of_memory']}\n" for row in rows if row["out_of_memory"]
    )
    markdown = (
        f"# Every phase of a run on {record['device']}, in GiB\n\n{about} Reserved does not fall within a process: the "
        f"allocator keeps what it has.\n\n{markdown_table(_HEADINGS, cells, text_columns=2)}\n\n"
        f"The highest phase of each beside the floor of its training steps. {FLOOR_TEXT}\n\n"
        f"{markdown_table(_FLOOR_HEADINGS, floors, text_columns=2)}\n\n"
        + (f"Out of memory, with the highest readings until there:\n\n{ran_out}\n" if ran_out else "")
        + f"{provenance_lines(record)}\n"
    )
    write_result(folder, "phases", phases_content(lives, record), markdown, rows)


def _rows(lives: Lives) -> list[dict[str, Any]]:
    return [
        {
            "recipe": recipe,
            "phase": each.phase,
            "allocated_bytes": each.allocated,
            "allocated_budget_bytes": each.allocated_budget,
            "reserved_bytes": each.reserved,
            "device_bytes": each.device,
            "device_budget_bytes": each.device_budget,
            "floor_bytes": each.floor,
            "out_of_memory": each.out_of_memory or None,
        }
        for recipe, life in lives.items()
        for each in life
    ]
