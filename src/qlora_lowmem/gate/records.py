"""What the gate keeps of a run: its peaks, where their bytes were, and what figures of other runs may be held against.

A record is plain data. It says nothing of good or bad: `verdicts` compares two.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from qlora_lowmem.memory.attribution import Attribution, OwnerLine
from qlora_lowmem.memory.profile import MemoryProfile, Peak

# Lines of code that a record keeps, the largest: as many as an attribution has (`explanation.MAX_OWNERS`).
MAX_LINES = 40


@dataclass(frozen=True)
class Key:
    """What two runs must have in common for their bytes to be comparable.

    Attributes:
        device: the card's name.
        provenance: `virtual` or `measured`.
        torch: with its build tag, `2.14.1+cu130`.
        cuda: the version that torch was built for, `13.0`.
        transformers, peft, trl, bitsandbytes: versions, or `not installed`.
        allocator: options of the caching allocator.
        recipe: the recipe's hash; empty for a test, whose code is what is under test.
    """

    device: str
    provenance: str
    torch: str
    cuda: str
    transformers: str
    peft: str
    trl: str
    bitsandbytes: str
    allocator: str
    recipe: str = ""

    def differences(self, other: "Key") -> dict[str, tuple[str, str]]:
        """Fields in which `other` differs: name to (here, there)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


# The fields of a key that say which packages ran, and not what was run on what.
VERSION_FIELDS = ("torch", "cuda", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Record:
    """A case's peaks, in bytes.

    Attributes:
        allocated, reserved, device: the highest of all phases, as in `MemoryProfile`.
        phases: allocated peak by phase.
        kinds: bytes by kind (`memory.kinds.KINDS`) at the attributed peak; empty where it was not attributed.
        modules: requested bytes by the block of the model that holds them (`model.layers.4`) at that peak.
        lines: bytes by `kind | line of code` at that peak, the largest ones.
        versions: all that were installed and could matter, also those that the key leaves out.
    """

    key: Key
    allocated: int
    reserved: int
    device: int
    phases: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Record":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: fields that are missing, unknown or of another type.
        """
        record = cls(**{**content, "key": Key(**content["key"])})
        counts = [record.allocated, record.reserved, record.device]
        for group in (record.phases, record.kinds, record.modules, record.lines):
            counts.extend(group.values())
        if any(type(count) is not int for count in counts):
            raise TypeError("a number of bytes is not an integer")
        return record


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
