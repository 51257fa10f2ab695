"""A job's peaks, phase by phase. Bytes are integers; nothing here touches a device."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_lowmem import virtual_gpu

Provenance = Literal["virtual", "measured"]


def provenance_here() -> Provenance:
    """What a figure of this process's GPU is."""
    return "measured" if virtual_gpu.current_card() is None else "virtual"


# The life of a run, in its order. `warm-up` is the longest batch, tried before the first step.
PHASES = ("load", "resume", "warm-up", "first step", "steady", "evaluate", "save", "merge")


@dataclass(frozen=True)
class PhasePeak:
    """The highest readings within one phase of a job, in bytes.

    Attributes:
        name: one of `PHASES`.
        allocated: `torch.cuda.max_memory_allocated()`: blocks in use by tensors.
        reserved: `torch.cuda.max_memory_reserved()`: segments that the caching allocator took from the card.
        device: what the card had to hold: reserved, plus the CUDA context and whatever bypassed the allocator.
    """

    name: str
    allocated: int
    reserved: int
    device: int


@dataclass(frozen=True)
class MemoryProfile:
    """The truth about a job's memory on one device.

    Attributes:
        device: the card's name.
        provenance: `virtual` (executed on a virtual GPU) or `measured` (on the hardware itself).
        total_bytes: the card's memory as CUDA reports it.
        outside_allocator_bytes: CUDA context, and library allocations that bypass the caching allocator.
        phases: peaks in the order of `PHASES`, those that were there.
    """

    device: str
    provenance: Provenance
    total_bytes: int
    outside_allocator_bytes: int
    phases: tuple[PhasePeak, ...]

    @property
    def peak_allocated_bytes(self) -> int:
        """The highest allocated peak of all phases."""
        return max((phase.allocated for phase in self.phases), default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """The highest reserved peak of all phases."""
        return max((phase.reserved for phase in self.phases), default=0)

    @property
    def peak_device_bytes(self) -> int:
        """What the card must hold, CUDA context included."""
        return max((phase.device for phase in self.phases), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the three peaks on top."""
        return {
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "device": self.device,
            "provenance": self.provenance,
            "total_bytes": self.total_bytes,
            "outside_allocator_bytes": self.outside_allocator_bytes,
            "phases": [asdict(phase) for phase in self.phases],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "MemoryProfile":
        """The inverse of `to_dict`."""
        return cls(
            device=content["device"],
            provenance=content["provenance"],
            total_bytes=content["total_bytes"],
            outside_allocator_bytes=content["outside_allocator_bytes"],
            phases=tuple(PhasePeak(**phase) for phase in content["phases"]),
        )
