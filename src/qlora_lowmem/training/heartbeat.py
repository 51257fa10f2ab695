"""A job's heartbeat: what its allocator holds, in `memory.json` of its output folder, for `qlora_lowmem.watch`."""

import contextlib
import dataclasses
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import is_first
from qlora_lowmem.errors import DoesNotFitError
from qlora_lowmem.memory.profile import LiveMemory, read_live, write_live
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.recipe import Recipe

INTERVAL_SECONDS = 0.5


class Heartbeat(TrainerCallback):
    """Reads the allocator's counters after each micro-batch and writes them twice a second at most.

    The counters are the allocator's own on the host: nothing waits for the GPU. Peaks are kept here, since the
    recorder resets torch's at each step. Use it as a context around the run: its end tells how the job ended. A file
    that cannot be written (a full disk) stops no training. Of several processes, the one of rank 0 writes.

    On a virtual card it is a trial, which writes nothing else into the folder: the file of a run that really trains or
    has trained there stays as it is, and so does that of another trial as long as it runs.
    """

    def __init__(self, recipe: Recipe) -> None:
        process = psutil.Process()
        device = recipe.run.device if virtual_gpu.current_card() is None else "virtual"
        self._folder = Path(recipe.run.output_dir)
        self._live = LiveMemory(process.pid, process.create_time(), time.time(), recipe.name, device)
        self._recorder: Recorder | None = None
        self._written = 0.0

    def watch(self, recorder: Recorder | None) -> None:
        """The recorder that knows what lies outside the allocator; None on a CPU."""
        self._recorder = recorder

    def __enter__(self) -> "Heartbeat":
        self._beat(now=True, phase="loading")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._beat(now=True, phase="ended", outcome=_outcome(error))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is loaded."""
        self._beat(now=True, phase="training", step=state.global_step, steps=state.max_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One micro-batch further."""
        self._beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step further."""
        self._beat(step=state.global_step)

    def _beat(self, *, now: bool = False, **changes: Any) -> None:
        if not is_first():
            return
        clock = time.monotonic()
        due = now or clock - self._written >= INTERVAL_SECONDS
        if torch.cuda.is_initialized():
            changes |= self._allocator()
        if due and self._recorder is not None:
            changes["outside"] = max(self._recorder.outside_allocator_bytes, 0)
        self._live = dataclasses.replace(self._live, time=time.time(), **changes)
        if due:
            self._written = clock
            with contextlib.suppress(OSError):
                if self._live.device == "virtual" and self._is_another_runs():
                    return
                self._folder.mkdir(parents=True, exist_ok=True)
                write_live(self._folder, self._live)

    def _is_another_runs(self) -> bool:
        """Whether the file in the folder is a real run's, or another trial's that still runs."""
        try:
            found = read_live(self._folder)
        except (OSError, ValueError):
            return False
        if found.device != "virtual":
            return True
        if (found.pid, found.started) == (self._live.pid, self._live.started) or found.phase == "ended":
            return False
        try:
            return psutil.Process(found.pid).create_time() == found.started
        except psutil.Error:
            return False

    def _allocator(self) -> dict[str, Any]:
        stats = torch.cuda.memory_stats(0)
        card = torch.cuda.get_device_properties(0)
        total = int(card.total_memory)
        return {
            "card": card.name,
            "gpu": "" if self._live.device == "virtual" else f"GPU-{card.uuid}",
            "allocated": stats["allocated_bytes.all.current"],
            "reserved": stats["reserved_bytes.all.current"],
            "peak_allocated": max(self._live.peak_allocated, stats["allocated_bytes.all.peak"]),
            "peak_reserved": max(self._live.peak_reserved, stats["reserved_bytes.all.peak"]),
            # As the allocator computes its cap (CUDACachingAllocator.cpp, setMemoryFraction).
            "limit": int(torch.cuda.get_per_process_memory_fraction(0) * total),
            "total": total,
        }


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "done"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "out of GPU memory" if isinstance(error, DoesNotFitError) else "failed"
