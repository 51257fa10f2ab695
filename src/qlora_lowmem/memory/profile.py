"""A job's memory as plain data: its peaks and launches by phase, and what it says of itself while it runs.

Bytes are integers. Nothing here imports torch or touches a device.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.files import Count, as_dataclass, read_json, write_whole
from qlora_lowmem.virtual_gpu import Launches

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

    allocated: Count = 0
    reserved: Count = 0
    device: Count = 0

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
        launches: kernels, copies and memsets by phase, the most that one stretch of it submitted: of `steady`, one
            optimizer step with all its micro-batches. Empty on a GPU, where nobody counts them.
        micro_batch_launches: of those of a step, the last micro-batch: forward, recomputation, backward.
    """

    device: str
    provenance: Provenance
    total_bytes: int
    outside_allocator_bytes: int
    phases: Mapping[str, Peak]
    launches: Mapping[str, Launches] = field(default_factory=dict)
    micro_batch_launches: Launches | None = None

    @property
    def step_launches(self) -> Launches | None:
        """Of one steady optimizer step; None where there was none, or nobody counted."""
        return self.launches.get("steady")

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return Peak.highest(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the three peaks on top; without launches where nobody counted."""
        peaks = {f"peak_{figure}_bytes": count for figure, count in asdict(self.peak).items()}
        totals = {name: {"launches": launches.total} for name, launches in self.launches.items()}
        phases = [{"name": name, **asdict(peak), **totals.get(name, {})} for name, peak in self.phases.items()]
        content = {**peaks, **msgspec.to_builtins(self), "phases": phases}
        counted = {"launches": self.launches, "micro_batch_launches": self.micro_batch_launches}
        return {name: value for name, value in content.items() if counted.get(name, True)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "MemoryProfile":
        """The inverse of `to_dict`."""
        return msgspec.convert({**content, "phases": {phase["name"]: phase for phase in content["phases"]}}, cls)


MEMORY_FILE = "memory.json"  # in a run's folder: `heartbeat.py` replaces it whole, `watch/` reads it


@dataclass(frozen=True)
class LiveMemory:
    """A job's newest reading. Bytes are integers; times are seconds since 1970.

    Attributes:
        pid, started: the process, and when it began: a later process may get the same pid.
        time: when this was read.
        recipe: the recipe's name.
        device: `cuda`, `virtual` or `cpu`; on a CPU all figures of a card are 0.
        card: the card's name.
        gpu: the GPU's UUID as NVML writes it; empty for `virtual` and `cpu`.
        phase: `loading`, `training` or `ended`.
        outcome: how it ended (`done`, `interrupted`, `out of GPU memory`, `failed`); empty until then.
        step, steps: optimizer steps done, and in all; 0 until training begins.
        allocated, reserved: what the caching allocator has given to tensors, and has taken from the card.
        peak_allocated, peak_reserved: the highest of both since the job began.
        outside: CUDA context and what libraries took past the allocator.
        limit: what the allocator may reserve at most.
        total: the card's memory as CUDA reports it.
    """

    pid: int
    started: float
    time: float
    recipe: str
    device: str
    card: str = ""
    gpu: str = ""
    phase: Literal["loading", "training", "ended"] = "loading"
    outcome: str = ""
    step: int = 0
    steps: int = 0
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    outside: int = 0
    limit: int = 0
    total: int = 0


def write_live(folder: Path, live: LiveMemory) -> None:
    """Replace the file in `folder`: a reader sees the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / MEMORY_FILE, json.dumps(asdict(live)) + "\n")


def read_live(folder: Path) -> LiveMemory:
    """The newest reading in `folder`.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is torn, or no job of this project wrote it.
    """
    return as_dataclass(LiveMemory, read_json(folder / MEMORY_FILE))
