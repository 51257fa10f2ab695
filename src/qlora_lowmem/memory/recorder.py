"""Read a job's peaks while it runs: the caching allocator's counters, and NVML for what the card holds besides.

The same readings on a real and a virtual GPU. Start the recorder before CUDA is initialised, so that what other
programs hold can be told from the CUDA context of this one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pynvml
import torch

from qlora_lowmem.memory.device import device_handle
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak, Provenance


class Recorder:
    """Peaks by phase of the job in this process, on one CUDA device.

    Use `phase(name)` around a stretch of the job, or `begin(name)` / `end()` from callbacks. A phase that is begun
    again under the same name (a step, an evaluation) is merged into its highest readings.
    """

    def __init__(self, device_name: str, provenance: Provenance, index: int = 0) -> None:
        self._device_name = device_name
        self._provenance = provenance
        self._index = index
        self._phases: dict[str, Peak] = {}
        self._current: str | None = None
        self._outside = 0
        self._handle = device_handle(index)
        self._used_by_others = self._used()
        torch.cuda.init()
        torch.empty(1, device=f"cuda:{index}")  # creates the context and the first segment
        torch.cuda.synchronize(index)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what runs inside as (part of) the phase `name`. If it fails, `running_phase` says that it was here."""
        self.begin(name)
        yield
        self.end()

    def begin(self, name: str) -> None:
        """Start the phase `name` (one of `PHASES`), ending the one that runs."""
        if name not in PHASES:
            raise ValueError(f"{name!r} is no phase; there are {', '.join(PHASES)}")
        self.end()
        torch.cuda.reset_peak_memory_stats(self._index)
        self._current = name

    def end(self) -> None:
        """End the running phase, if any, and keep its peaks."""
        if self._current is None:
            return
        torch.cuda.synchronize(self._index)
        allocated = torch.cuda.max_memory_allocated(self._index)
        reserved = torch.cuda.max_memory_reserved(self._index)
        # What the card holds for this process beyond the allocator's segments. Read while segments are cached, so
        # `reserved` now is subtracted, not its peak.
        now = self._used() - self._used_by_others - torch.cuda.memory_reserved(self._index)
        self._outside = max(self._outside, now)
        now_highest = Peak(allocated, reserved, reserved + self._outside)
        self._phases[self._current] = Peak.highest((self._phases.get(self._current, Peak()), now_highest))
        self._current = None

    @property
    def index(self) -> int:
        """Of the CUDA device."""
        return self._index

    @property
    def running_phase(self) -> str | None:
        """The phase that has begun and not ended."""
        return self._current

    def room_bytes(self) -> int:
        """Bytes that the caching allocator could still take from the card without touching other programs' share."""
        return int(self._info().free)

    @property
    def outside_allocator_bytes(self) -> int:
        """The CUDA context of this process and what libraries took past the allocator."""
        return max(self._outside, self._used() - self._used_by_others - torch.cuda.memory_reserved(self._index))

    def live_bytes(self) -> tuple[int, int]:
        """(allocated now, peak reserved in this phase with what lies outside the allocator)."""
        return (
            torch.cuda.memory_allocated(self._index),
            torch.cuda.max_memory_reserved(self._index) + self._outside,
        )

    def peak_bytes(self) -> tuple[int, int, int]:
        """(allocated, reserved, outside the allocator) at their highest since a phase last began."""
        return (
            torch.cuda.max_memory_allocated(self._index),
            torch.cuda.max_memory_reserved(self._index),
            self._outside,
        )

    def profile(self) -> MemoryProfile:
        """Everything recorded until now."""
        self.end()
        return MemoryProfile(
            device=self._device_name,
            provenance=self._provenance,
            total_bytes=int(torch.cuda.get_device_properties(self._index).total_memory),
            outside_allocator_bytes=self._outside,
            phases={name: self._phases[name] for name in PHASES if name in self._phases},
        )

    def _info(self) -> "pynvml.c_nvmlMemory_t":
        return pynvml.nvmlDeviceGetMemoryInfo(self._handle)

    def _used(self) -> int:
        return int(self._info().used)
