"""Measure and attribute the GPU memory of any test that uses torch, in the process that runs it."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch.cuda import memory as cuda_memory

from qlora_lowmem.gate.plain_attribution import PlainEvidence, PlainOwner, attribute
from qlora_lowmem.gate.plain_scopes import PlainScopes
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.device import device_handle, device_name
from qlora_lowmem.memory.history import replay
from qlora_lowmem.memory.owners import quantisation_tensors
from qlora_lowmem.memory.profile import MemoryProfile, Peak, provenance_here
from qlora_lowmem.memory.snapshots import library_workspaces, no_collection, take_snapshot

# Of the allocator's history; a test with more keeps its peak and loses its attribution.
_MAX_EVENTS = 1_000_000
_WORKSPACE = PlainOwner("libraries", "", "cuBLAS workspace")

# Bytes that other programs held on each device before this process used it. A process may measure many tests, and its
# CUDA context is there from the first.
_used_by_others: dict[int, int] = {}


@dataclass(frozen=True)
class Measurement:
    """What a test used.

    Attributes:
        profile: its peaks as one phase.
        attribution: where they were, if the history could be followed.
        snapshot: the allocator's, with its history.
    """

    profile: MemoryProfile
    attribution: Attribution | None
    snapshot: dict[str, Any]


class PlainRecorder:
    """Peaks between `start` and `stop` on one CUDA device; start before the test makes anything.

    Allocates nothing on the device and holds no tensor, so that the peaks are those of the test alone.

    Args:
        root: the project's folder; lines of code are named relative to it.
        index: of the CUDA device.
    """

    def __init__(self, root: Path, index: int = 0) -> None:
        self._root = f"{root}/".lstrip("/")
        self._index = index
        self._scopes = PlainScopes(self._note_owners)
        self._seen: list[tuple[int, int, PlainOwner]] = []
        self._names: dict[int, str] = {}
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
            evidence = PlainEvidence(self._scopes.scope_of, tuple(self._seen), workspaces)
            found = attribute(history, evidence, profile, self._root) if history.faults == 0 else None
        self._before = {}
        return Measurement(profile, found, after)

    def _watch_resets(self) -> None:
        """A test may reset the peaks itself; what came before counts all the same."""
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
        position = self._scopes.position
        for prefix, root in self._scopes.roots():
            for own, parameter in root.named_parameters():
                self._names[id(parameter)] = name = prefix + own
                quantised = getattr(parameter, "quant_state", None)  # only bitsandbytes' Params4bit has one
                kind = "weights_4bit" if quantised is not None else "adapters" if "lora_" in name else "weights_other"
                self._note(position, parameter, kind, name)
                for _, tensor in quantisation_tensors(quantised) if quantised is not None else ():
                    self._note(position, tensor, "quantisation", name)
                if parameter.grad is not None:
                    self._note(position, parameter.grad, "gradients", name)
            for own, buffer in root.named_buffers():
                self._note(position, buffer, "weights_other", prefix + own)
        for reference in self._scopes.optimizers:
            optimizer = reference()
            for trained, state in optimizer.state.items() if optimizer is not None else ():
                for value in state.values() if isinstance(state, dict) else ():
                    if isinstance(value, torch.Tensor):
                        self._note(position, value, "optimizer", self._names.get(id(trained), ""))

    def _note(self, position: int, tensor: torch.Tensor, kind: str, name: str) -> None:
        if tensor.is_cuda and tensor.device.index == self._index and tensor.untyped_storage().nbytes():
            owner = PlainOwner(kind, name, f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}")
            self._seen.append((position, tensor.untyped_storage().data_ptr(), owner))
