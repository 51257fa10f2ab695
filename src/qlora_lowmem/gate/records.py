"""What the gate keeps of a run, and what changed from one to the next: by kind, module, line and package version.

A record is plain data and says nothing of good or bad: `verdicts` judges.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tabulate import tabulate

from qlora_lowmem.memory.attribution import MAX_OWNERS, Attribution
from qlora_lowmem.memory.kinds import KINDS
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.results.kinds.verdicts import Key, Record
from qlora_lowmem.units import format_bytes, format_signed

# The fields of a key that say which packages ran, and not what was run on what.
VERSION_FIELDS = ("torch", "cuda", "transformers", "peft", "trl", "bitsandbytes")
# In the order in which torch 2.14 reads them; the first that is set decides.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ROWS = 6


def key_of(device: str, provenance: str, allocator: str, versions: Mapping[str, str], recipe: str = "") -> Key:
    """The key of a run with these options of the allocator and `environment.versions`; a recipe's by its hash."""
    build = re.search(r"\+cu(\d+)(\d)$", versions["torch"])
    packages = {name: versions[name] for name in VERSION_FIELDS if name != "cuda"}
    cuda = f"{build[1]}.{build[2]}" if build else "none"
    return Key(device, provenance, cuda=cuda, allocator=allocator, recipe=recipe, **packages)


def allocator_of_environment() -> str:
    """The allocator's options that environment variables set; `default` where none is."""
    return next((os.environ[name] for name in _ALLOCATOR_VARIABLES if os.environ.get(name)), "default")


def record_of(
    key: Key, profile: MemoryProfile, attribution: Attribution | None = None, versions: Mapping[str, str] | None = None
) -> Record:
    """The record of a run."""
    launches = profile.step_launches or profile.launches.get("test")
    record = Record(
        key=key,
        allocated=profile.peak.allocated,
        reserved=profile.peak.reserved,
        device=profile.peak.device,
        phases={name: peak.allocated for name, peak in profile.phases.items()},
        versions=dict(versions or {}),
        launches=launches.total if launches is not None else None,
    )
    return attributed(record, attribution) if attribution is not None else record


def attributed(record: Record, attribution: Attribution) -> Record:
    """The record with where the bytes of its peak are."""
    return replace(
        record,
        kinds=dict(attribution.kinds),
        modules=dict(sorted(attribution.modules.items())),
        lines={f"{owner.kind} | {owner.line}": owner.bytes for owner in attribution.owners[:MAX_OWNERS]},
    )


@dataclass(frozen=True)
class Change:
    """One row: a kind, module or line, and its bytes before and after; None where it was not there."""

    name: str
    before: int | None
    after: int | None

    @property
    def bytes(self) -> int:
        """How much more there is, negative for less."""
        return (self.after or 0) - (self.before or 0)

    @property
    def remark(self) -> str:
        """`new`, `gone` or nothing."""
        return "new" if self.before is None else "gone" if self.after is None else ""


@dataclass(frozen=True)
class Difference:
    """What changed from one record to another, the largest changes first.

    Attributes:
        kinds: by key of `memory.kinds.KINDS`.
        modules: by block of the model.
        lines: by `kind | line of code`; lines that only moved within their file cancel out.
        versions: packages that changed: name to (before, after).
    """

    kinds: tuple[Change, ...]
    modules: tuple[Change, ...]
    lines: tuple[Change, ...]
    versions: Mapping[str, tuple[str, str]]

    def render(self) -> str:
        """Tables for a terminal."""
        tables = {"kind": self.kinds, "module": self.modules, "line": self.lines}
        parts = [_table(title, changes) for title, changes in tables.items() if changes]
        changed = [f"{name} {old} -> {new}" for name, (old, new) in self.versions.items()]
        return "\n\n".join([*parts, f"packages: {', '.join(changed) or 'the same versions'}"])


def difference(before: Record, after: Record) -> Difference:
    """From the baseline `before` to the run `after`. Without attribution on both sides only versions are compared."""
    everything = sorted(before.versions.keys() | after.versions.keys())
    pairs = {name: tuple(side.versions.get(name, "not recorded") for side in (before, after)) for name in everything}
    versions = {name: (old, new) for name, (old, new) in pairs.items() if old != new}
    if not before.kinds or not after.kinds:
        return Difference((), (), (), versions)
    lines = _line_changes(before.lines, after.lines)
    return Difference(changes(before.kinds, after.kinds), changes(before.modules, after.modules), lines, versions)


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    """Entries that differ, the largest growth first and the largest saving last."""
    found = [Change(name, before.get(name), after.get(name)) for name in before.keys() | after.keys()]
    return tuple(sorted((change for change in found if change.bytes), key=lambda change: (-change.bytes, change.name)))


def _line_changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    """Records keep the largest lines only: a change that can be a line that came in or fell out at the end is none."""
    doubt = 2 * max((min(side.values()) for side in (before, after) if len(side) >= MAX_OWNERS), default=0)
    found = changes(_unnumbered(before), _unnumbered(after))
    return tuple(change for change in found if abs(change.bytes) > doubt)


def _unnumbered(lines: Mapping[str, int]) -> Mapping[str, int]:
    """Bytes by kind, file and function: line numbers move with every edit above them."""
    sums: Counter[str] = Counter()
    for text, count in lines.items():
        place, _, function = text.rpartition(" ")
        sums[f"{place.rpartition(':')[0] or place} {function}"] += count
    return sums


def _table(title: str, found: tuple[Change, ...]) -> str:
    """The largest in size, whatever their sign, in the order of `found`."""
    largest = sorted(found, key=lambda change: -abs(change.bytes))[:_ROWS]
    body = [
        [
            KINDS.get(change.name, change.name) if title == "kind" else change.name or "(outside of the model)",
            *("-" if count is None else format_bytes(count) for count in (change.before, change.after)),
            format_signed(change.bytes),
            change.remark,
        ]
        for change in found
        if change in largest
    ]
    headers, align = [title, "baseline", "now", "difference", ""], ("left", "right", "right", "right", "left")
    return tabulate(body, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align)
