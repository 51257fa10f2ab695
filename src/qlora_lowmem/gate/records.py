"""What the gate keeps of a run: its peaks, where their bytes were, and what figures of other runs may be held against.

A record is plain data. It says nothing of good or bad: `verdicts` compares two.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_lowmem.memory.attribution import Attribution, OwnerLine
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.results.kinds.verdicts import Key, Record

# Lines of code that a record keeps, the largest: as many as an attribution has (`attribution.MAX_OWNERS`).
MAX_LINES = 40


# The fields of a key that say which packages ran, and not what was run on what.
VERSION_FIELDS = ("torch", "cuda", "transformers", "peft", "trl", "bitsandbytes")


def record_of(
    key: Key, profile: MemoryProfile, attribution: Attribution | None = None, versions: Mapping[str, str] | None = None
) -> Record:
    """The record of a run."""
    record = Record(
        key=key,
        allocated=profile.peak_allocated_bytes,
        reserved=profile.peak_reserved_bytes,
        device=profile.peak_device_bytes,
        phases={name: peak.allocated for name, peak in profile.phases.items()},
        versions=dict(versions or {}),
    )
    return attributed(record, attribution) if attribution is not None else record


def attributed(record: Record, attribution: Attribution) -> Record:
    """The record with where the bytes of its peak are."""
    return replace(
        record,
        kinds=dict(attribution.kinds),
        modules=dict(sorted(attribution.modules.items())),
        lines=_lines(attribution.owners),
    )


def _lines(owners: tuple[OwnerLine, ...]) -> dict[str, int]:
    return {f"{owner.kind} | {owner.line}": owner.bytes for owner in owners[:MAX_LINES]}


def profile_of(record: Record) -> MemoryProfile:
    """A record's peaks as a profile of one phase, for tables and relations."""
    peak = Peak(record.allocated, record.reserved, record.device)
    provenance: Any = record.key.provenance
    return MemoryProfile(record.key.device, provenance, 0, record.device - record.reserved, {"peak": peak})
