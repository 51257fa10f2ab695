"""Read a job's peaks while it runs: the caching allocator's counters and history, and NVML for what the card holds
besides.

The same readings on a real and a virtual GPU. Start a recorder before CUDA is initialised, so that what other programs
hold can be told from the CUDA context of this one.
"""

import gc
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch.cuda import memory as cuda_memory

from qlora_lowmem.memory.attribution import Attribution, Evidence, explain
from qlora_lowmem.memory.device import device_handle, device_name
from qlora_lowmem.memory.history import replay
from qlora_lowmem.memory.kinds import ProgramNamer
from qlora_lowmem.memory.owners import Owner, Owners
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak, Provenance, provenance_here
from qlora_lowmem.memory.scopes import ProgramScopes

# Of the allocator's history; a program with more keeps its peak and loses its attribution.
_MAX_EVENTS = 1_000_000
_WORKSPACE = Owner("libraries", "", "cuBLAS workspace")

# Bytes that other programs held on each device before this process used it. A process may measure many programs, and
# its CUDA context is there from the first.
_used_by_others: dict[int, int] = {}


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
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)

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

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


@dataclass(frozen=True)
class Measurement:
    """What a program used.

    Attributes:
        profile: its peaks as one phase, `test`.
        attribution: where they were, if the history could be followed.
        snapshot: the allocator's, with its history.
    """

    profile: MemoryProfile
    attribution: Attribution | None
    snapshot: dict[str, Any]


class ProgramRecorder:
    """Peaks, and where they were, of anyone's code between `start` and `stop` on one CUDA device, in this process.

    Start before the code makes anything. Allocates nothing on the device and holds no tensor, so that the peaks are
    those of the code alone.

    Args:
        root: the project's folder; lines of code are named relative to it.
        index: of the CUDA device.
    """

    def __init__(self, root: Path, index: int = 0) -> None:
        self._index = index
        self._namer = ProgramNamer(f"{root}/".lstrip("/"))
        self._owners = Owners(self._namer, index)
        self._scopes = ProgramScopes(self._note_owners)
        self._seen: list[tuple[int, int, Owner]] = []
        self._names: dict[int, str] = {}  # of parameters, by their id
        self._before: dict[str, Any] = {}
        self._peaks = (0, 0)
        self._undo: list[Callable[[], None]] = []
        self._handle = device_handle(index)

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: torch sees no GPU.
        """
        if not torch.cuda.is_initialized():
            _used_by_others[self._index] = self._used()
        torch.cuda.init()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._index)
        self._watch_resets()
        with no_collection():
            cuda_memory._record_memory_history(
                "all", context="alloc", stacks="python", max_entries=_MAX_EVENTS, clear_history=True
            )
            self._before = take_snapshot()
        self._scopes.attach()

    def stop(self) -> Measurement:
        """End, and say what it came to."""
        torch.cuda.synchronize(self._index)
        self._fold_peaks()
        for undo in self._undo:
            undo()
        self._scopes.remove()
        allocated, reserved = self._peaks
        outside = max(0, self._used() - _used_by_others.get(self._index, 0) - torch.cuda.memory_reserved(self._index))
        profile = MemoryProfile(
            device=device_name(self._index),
            provenance=provenance_here(),
            total_bytes=int(torch.cuda.get_device_properties(self._index).total_memory),
            outside_allocator_bytes=outside,
            phases={"test": Peak(allocated, reserved, reserved + outside)},
        )
        with no_collection():
            after = take_snapshot()
            cuda_memory._record_memory_history(None)
            workspaces = dict.fromkeys(library_workspaces(self._index), _WORKSPACE)
            history = replay(self._before, after, self._index)
            evidence = Evidence(self._scopes.log.window, at_end=workspaces, seen=self._seen)
            followed = history.faults == 0 and history.peak_bytes <= allocated
            found = explain(history, evidence, self._namer, profile, "test") if followed else None
        self._before = {}
        return Measurement(profile, found, after)

    def _watch_resets(self) -> None:
        """The code may reset the peaks itself; what came before counts all the same."""
        for name in ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats"):
            reset = getattr(torch._C, name, None)
            if reset is None:
                continue

            def fold_and_reset(*arguments: Any, _reset: Callable[..., Any] = reset) -> Any:
                self._fold_peaks()
                return _reset(*arguments)

            setattr(torch._C, name, fold_and_reset)
            self._undo.append(partial(setattr, torch._C, name, reset))

    def _fold_peaks(self) -> None:
        now = (torch.cuda.max_memory_allocated(self._index), torch.cuda.max_memory_reserved(self._index))
        self._peaks = (max(self._peaks[0], now[0]), max(self._peaks[1], now[1]))

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _note_owners(self) -> None:
        """Weights, gradients and optimizer state as they are now, by address."""
        position = self._scopes.log.end
        found = []
        for prefix, root in self._scopes.roots():
            self._names |= {id(parameter): prefix + name for name, parameter in root.named_parameters()}
            found += [self._owners.weights(root, prefix), self._owners.gradients(root, prefix)]
        found += [self._owners.optimizer_state(optimizer(), self._names) for optimizer in self._scopes.optimizers]
        self._seen.extend((position, address, owner) for address, owner in itertools.chain(*found))


@contextmanager
def no_collection() -> Iterator[None]:
    """Many small objects are made here; a collection in their midst would free the job's garbage at another time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def take_snapshot() -> dict[str, Any]:
    """The allocator's segments, blocks and recorded history, as `torch.cuda.memory._snapshot` gives them."""
    with no_collection():
        snapshot: dict[str, Any] = cuda_memory._snapshot()
        return snapshot


def write_snapshot(snapshot: dict[str, Any], path: Path) -> None:
    """Write a snapshot for https://pytorch.org/memory_viz, which opens it as torch's own `_dump_snapshot`."""
    with path.open("wb") as file:
        pickle.dump(snapshot, file)


def library_workspaces(device: int) -> set[int]:
    """Addresses of cuBLAS' and cuBLASLt's workspaces on a device: what torch lets go when told to clear them.

    torch makes new ones when it needs them.
    """
    held = _active(device)
    torch._C._cuda_clearCublasWorkspaces()
    return held - _active(device)


def _active(device: int) -> set[int]:
    return {
        block["address"]
        for segment in take_snapshot()["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
