"""Allocated bytes by kind over the events of a step, at few enough points to draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.memory.history import BEFORE, History

MAX_POINTS = 400


@dataclass(frozen=True)
class Timeline:
    """A step's memory over the allocator's events.

    Attributes:
        kinds: the kinds that occur, in the order of `kinds.KINDS`.
        events: index of the event of each point, rising; -1 is before the first.
        microseconds: time of each point since the first event.
        phases: where the step was at each point: `forward`, `backward`, ...
        bytes: for each point, bytes by kind in the order of `kinds`; a row sums to what was allocated then.
    """

    kinds: tuple[str, ...]
    events: tuple[int, ...]
    microseconds: tuple[int, ...]
    phases: tuple[str, ...]
    bytes: tuple[tuple[int, ...], ...]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Timeline":
        """The inverse of `dataclasses.asdict`."""
        rows = tuple(tuple(row) for row in content["bytes"])
        rest = {key: tuple(content[key]) for key in ("kinds", "events", "microseconds", "phases")}
        return cls(**rest, bytes=rows)


def chosen_events(totals: Sequence[int], limit: int = MAX_POINTS) -> list[int]:
    """Indexes into `totals`, at most `limit`, rising: first, last, and the highest and lowest of equal stretches.

    The highest of all is always among them.
    """
    count = len(totals)
    if count <= limit:
        return list(range(count))
    stretches = (limit - 2) // 2
    chosen = {0, count - 1}
    for stretch in range(stretches):
        part = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        chosen.add(max(part, key=totals.__getitem__))
        chosen.add(min(part, key=totals.__getitem__))
    return sorted(chosen)


def timeline(history: History, kinds: Sequence[str], phases: Sequence[str], order: Sequence[str]) -> Timeline:
    """Bytes by kind over `history`.

    Args:
        kinds: of each block of `history`.
        phases: in which each block of `history` was allocated; empty where that is not known.
        order: all kinds, as they are to be listed; `rounding` takes what the blocks are larger than their requests.
    """
    changes: dict[int, list[tuple[str, int]]] = {}
    phase_at: dict[int, str] = {}
    for block, kind, phase in zip(history.blocks, kinds, phases, strict=True):
        parts = ((kind, block.requested), ("rounding", block.size - block.requested))
        changes.setdefault(block.born, []).extend(parts)
        changes.setdefault(block.died, []).extend((key, -count) for key, count in parts)
        phase_at[block.born] = phase
    present = [kind for kind in order if kind in set(kinds) or kind == "rounding"]
    now = dict.fromkeys(present, 0)
    events, rows, names, times = [], [], [], []
    at, phase = BEFORE, ""
    start = history.times[0] if len(history.times) else 0
    for index in chosen_events(history.totals):
        event = index + BEFORE
        while at <= event:
            for kind, count in changes.get(at, ()):
                now[kind] += count
            phase = phase_at.get(at) or phase
            at += 1
        events.append(event)
        rows.append(tuple(now.values()))
        names.append(phase)
        times.append(history.times[event] - start if event >= 0 else 0)
    return Timeline(tuple(present), tuple(events), tuple(times), tuple(names), tuple(rows))
