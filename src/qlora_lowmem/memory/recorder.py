"""Read a job's peaks while it runs: the caching allocator's counters and history, and NVML for what lies outside it.

The same readings on a real and a virtual GPU; launches are counted on a virtual one alone. Start a recorder before CUDA
is initialised, so that what other programs hold can be told from the CUDA context of this one.
"""

import gc
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch.cuda import memory as cuda_memory

from qlora_lowmem.memory.attribution import Attribution, Evidence, explain
from qlora_lowmem.memory.descendants import DescendantsOnTheCard
from qlora_lowmem.memory.device import device_handle, device_name
from qlora_lowmem.memory.history import replay
from qlora_lowmem.memory.kinds import ProgramNamer
from qlora_lowmem.memory.owners import Owner, Owners
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak, provenance_here
from qlora_lowmem.memory.scopes import ProgramScopes
from qlora_lowmem.virtual_gpu import Launches, launches, together
from qlora_lowmem.virtual_gpu.together import Together

# Of the allocator's history; a program with more keeps its peak and loses its attribution.
_MAX_EVENTS = 1_000_000
_WORKSPACE = Owner("libraries", "", "cuBLAS workspace")

# Bytes that other programs held on each device before this process used it. A process may measure many programs, and
# its CUDA context is there from the first.
_held_before: dict[int, int] = {}


class _Readings:
    """What torch and NVML say of one CUDA device; `index` is torch's."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._outside = 0
        self._handle = device_handle(index)
        self._used_by_others = self._used()

    def peak(self) -> Peak:
        """The highest readings since torch's were last reset, with the most that was seen outside the allocator."""
        reserved = torch.cuda.max_memory_reserved(self.index)
        return Peak(torch.cuda.max_memory_allocated(self.index), reserved, reserved + self._outside)

    @property
    def outside_allocator_bytes(self) -> int:
        """The most that the CUDA context of this process and libraries took past the allocator, until now.

        Read while segments are cached, so what is reserved now is subtracted, not its peak.
        """
        return max(self._outside, self._used() - self._used_by_others - torch.cuda.memory_reserved(self.index))

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _profile(self, phases: Mapping[str, Peak]) -> MemoryProfile:
        total = int(torch.cuda.get_device_properties(self.index).total_memory)
        return MemoryProfile(device_name(self.index), provenance_here(), total, self._outside, phases)


class Recorder(_Readings):
    """Peaks by phase of the job in this process, on one CUDA device.

    Use `phase(name)` around a stretch of the job, or `begin(name)` / `end()` from callbacks. A phase that is begun
    again under the same name (a step, an evaluation) is merged into its highest readings. `running_phase` is the one
    that has begun and not ended.
    """

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self.running_phase: str | None = None
        self._phases: dict[str, Peak] = {}
        self._launches: dict[str, Launches] = {}
        self._launched = Launches()  # by this process before the running phase; less what of the phase was left out
        self._micro_batch: Launches | None = None
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
        torch.cuda.reset_peak_memory_stats(self.index)
        self._launched = launches.of_this_process() or Launches()
        self.running_phase = name

    def end(self) -> None:
        """End the running phase, if any, and keep its peaks and its launches."""
        now = launches.of_this_process()
        if self.running_phase is not None and now is not None:
            stretches = (self._launches.get(self.running_phase, Launches()), now - self._launched)
            self._launches[self.running_phase] = Launches.most(stretches)
        self._keep_peaks()

    def _keep_peaks(self) -> None:
        if self.running_phase is None:
            return
        torch.cuda.synchronize(self.index)
        self._outside = self.outside_allocator_bytes
        earlier = self._phases.get(self.running_phase, Peak())
        self._phases[self.running_phase] = Peak.highest((earlier, self.peak()))
        self.running_phase = None

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch of a step, whose launches are kept."""
        before = launches.of_this_process()
        yield
        after = launches.of_this_process()
        if self.running_phase is not None and before is not None and after is not None:
            self._micro_batch = after - before

    def micro_batch_again(self) -> None:
        """Count the last micro-batch once more: one that is left out would do the same."""
        if self._micro_batch is not None:
            self._launched -= self._micro_batch

    def room_bytes(self) -> int:
        """Bytes that the caching allocator could still take from the card without touching other programs' share."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).free)

    def profile(self) -> MemoryProfile:
        """Everything recorded until now; of a phase that has not ended, the peaks alone."""
        self._keep_peaks()
        found = self._profile({name: self._phases[name] for name in PHASES if name in self._phases})
        counted = {name: self._launches[name] for name in found.phases if name in self._launches}
        return replace(found, launches=counted, micro_batch_launches=self._micro_batch)


@dataclass(frozen=True)
class Measurement:
    """What a program used.

    Attributes:
        profile: its peaks and launches as one phase, `test`: on a virtual card those of all its processes together.
        attribution: where they were; None where other processes took part, or the history could not be followed.
        snapshot: this process' allocator; None where it used none.
        together: of what the profile's peaks are made, where other processes took part.
        uncounted: on a GPU, other processes of the program that were seen to use it. They are in no figure.
    """

    profile: MemoryProfile
    attribution: Attribution | None
    snapshot: dict[str, Any] | None
    together: Together | None = None
    uncounted: tuple[str, ...] = ()


class ProgramRecorder(_Readings):
    """Peaks, and where they were, of anyone's code between `start` and `stop` on CUDA device 0.

    Start before the code makes anything. Allocates nothing on the device and holds no tensor, so that the peaks are
    those of the code alone; and leaves it to the code to initialise CUDA, without which it may fork. Lines of code are
    named relative to `root`, the project's folder.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(0)
        self._namer = ProgramNamer(f"{root}/".lstrip("/"))
        self._owners = Owners(self._namer)
        self._scopes = ProgramScopes(self._note_owners)
        self._seen: list[tuple[int, int, Owner]] = []
        self._names: dict[int, str] = {}  # of parameters, by their id
        self._before: dict[str, Any] | None = None  # the history's beginning, once CUDA is in use
        self._process, self._stopped = 0, False
        self._descendants: DescendantsOnTheCard | None = None
        self._highest = Peak()
        self._launched: Launches | None = None  # on the machine, before
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Begin."""
        if not together.begin():
            self._descendants = DescendantsOnTheCard(self._handle)
        self._process = os.getpid()
        self._launched = launches.of_all_processes()
        gc.collect()
        self._watch_resets()
        self._scopes.attach()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.index)
            self._begin_history()
        else:
            _held_before[self.index] = self._used()
            torch.cuda._lazy_call(self._begin_history)
        self._used_by_others = _held_before.get(self.index, 0)

    def _begin_history(self) -> None:
        if not self._stopped and os.getpid() == self._process:  # torch calls it in forked children, too
            self._before = begin_history(_MAX_EVENTS)

    def stop(self) -> Measurement:
        """End, and say what it came to."""
        self._stopped = True
        now = launches.of_all_processes()
        for undo in self._undo:
            undo()
        self._scopes.remove()
        found = self._nothing_here() if self._before is None else self._stop_here(self._before)
        if now is not None and self._launched is not None:
            found = replace(found, profile=replace(found.profile, launches={"test": now - self._launched}))
        if self._descendants is not None:
            return replace(found, uncounted=self._descendants.stop())
        all_of_it = together.read(self.index)
        if all_of_it is None or not all_of_it.others:
            return found
        peak = Peak(all_of_it.allocated, all_of_it.reserved, all_of_it.device)
        profile = replace(found.profile, phases={"test": peak})
        return replace(found, profile=profile, attribution=None, together=all_of_it)

    def _nothing_here(self) -> Measurement:
        total = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        profile = MemoryProfile(device_name(self.index), provenance_here(), total, 0, {"test": Peak()})
        return Measurement(profile, None, None)

    def _stop_here(self, before: dict[str, Any]) -> Measurement:
        torch.cuda.synchronize(self.index)
        self._outside = self.outside_allocator_bytes
        self._fold_peaks()
        highest = replace(self._highest, device=self._highest.reserved + self._outside)
        profile = self._profile({"test": highest})
        with no_collection():
            after = take_snapshot()
            cuda_memory._record_memory_history(None)
            workspaces = dict.fromkeys(library_workspaces(self.index), _WORKSPACE)
            history = replay(before, after, self.index)
            evidence = Evidence(self._scopes.window, at_end=workspaces, seen=self._seen)
            followed = history.faults == 0 and history.peak_bytes <= self._highest.allocated
            found = explain(history, evidence, self._namer, profile, "test") if followed else None
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
        self._highest = Peak.highest((self._highest, self.peak()))

    def _note_owners(self) -> None:
        """Weights, gradients and optimizer state as they are now, by address."""
        position = self._scopes.end
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


def begin_history(events: int = sys.maxsize) -> dict[str, Any]:
    """Record the allocator's history from here on, at most so many events. Returns a snapshot of its beginning."""
    with no_collection():
        cuda_memory._record_memory_history(
            "all", context="alloc", stacks="python", max_entries=events, clear_history=True
        )
        return take_snapshot()


def take_snapshot() -> dict[str, Any]:
    """The allocator's segments, blocks and recorded history, as `torch.cuda.memory._snapshot` gives them."""
    with no_collection():
        snapshot: dict[str, Any] = cuda_memory._snapshot()
        return snapshot


def snapshot_file(snapshot: dict[str, Any]) -> bytes:
    """What a file of a snapshot holds that https://pytorch.org/memory_viz opens, as torch's own `_dump_snapshot`."""
    return pickle.dumps(snapshot)


def library_workspaces(device: int = 0) -> set[int]:
    """Addresses of cuBLAS' and cuBLASLt's workspaces: what torch lets go when told to, and makes again when needed."""

    def active() -> set[int]:
        segments = [segment for segment in take_snapshot()["segments"] if segment["device"] == device]
        blocks = [block for segment in segments for block in segment["blocks"]]
        return {block["address"] for block in blocks if block["state"] == "active_allocated"}

    held = active()
    torch._C._cuda_clearCublasWorkspaces()
    return held - active()
