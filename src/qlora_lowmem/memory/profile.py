"""A job's peaks, phase by phase. Bytes are integers; nothing here touches a device."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import msgspec

from qlora_lowmem import virtual_gpu

Provenance = Literal["virtual", "measured"]


def provenance_here() -> Provenance:
    """What a figure of this process's GPU is."""
    return "measured" if virtual_gpu.current_card() is None else "virtual"


# The life of a run, in its order. `warm-up` is the longest batch, tried before the first step.
PHASES = ("load", "resume", "warm-up", "first step", "steady", "evaluate", "save", "merge")


@dataclass(frozen=True)
class Peak:
    """The highest readings within a stretch of a job, in bytes, each at its own moment.

    Attributes:
        allocated: `torch.cuda.max_memory_allocated()`: blocks in use by tensors.
        reserved: `torch.cuda.max_memory_reserved()`: segments that the caching allocator took from the card.
        device: what the card had to hold: reserved, plus the CUDA context and whatever bypassed the allocator.
    """

    allocated: int = 0
    reserved: int = 0
    device: int = 0

    @classmethod
    def highest(cls, peaks: Iterable["Peak"]) -> "Peak":
        """The highest of each figure; zeros where there are no peaks."""
        found = list(peaks)
        return cls(*(max((getattr(peak, f.name) for peak in found), default=0) for f in fields(cls)))


@dataclass(frozen=True)
class MemoryProfile:
    """The truth about a job's memory on one device.

    Attributes:
        device: the card's name.
        provenance: `virtual` (executed on a virtual GPU) or `measured` (on the hardware itself).
        total_bytes: the card's memory as CUDA reports it.
        outside_allocator_bytes: CUDA context, and library allocations that bypass the caching allocator.
        phases: peaks by phase, in the order of `PHASES`, those that were there.
    """

    device: str
    provenance: Provenance
    total_bytes: int
    outside_allocator_bytes: int
    phases: Mapping[str, Peak]

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return Peak.highest(self.phases.values())

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest allocated peak of all phases."""
        return self.peak.allocated

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest reserved peak of all phases."""
        return self.peak.reserved

    @property
    def peak_device_bytes(self) -> int:
        """What the card must hold, CUDA context included."""
        return self.peak.device

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the three peaks on top."""
        peaks = {f"peak_{figure}_bytes": count for figure, count in asdict(self.peak).items()}
        phases = [{"name": name, **asdict(peak)} for name, peak in self.phases.items()]
        return {**peaks, **msgspec.to_builtins(self), "phases": phases}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "MemoryProfile":
        """The inverse of `to_dict`."""
        return msgspec.convert({**content, "phases": {phase["name"]: phase for phase in content["phases"]}}, cls)
