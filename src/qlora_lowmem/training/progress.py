"""What a run tells while it trains: a line on the screen, `log.jsonl` for programs, `memory.json` for the watch.

A line of the log, for each logged step, evaluation and fallback:

    {"step": 12, "epoch": 0.4, "loss": 2.31, "grad_norm": 0.8, "learning_rate": 0.0002, "tokens": 9812,
     "tokens_per_second": 410.2, "seconds_left": 84.1, "vram": {"allocated": ..., ...}, "time": 1763990000.0}
    {"step": 20, "eval_loss": 2.2, ...}
    {"step": 21, "out_of_memory": "steady", "retreat": {"lean": true}, ...}

It is on the disk before training goes on. A run that is resumed drops what was logged after its checkpoint, so a step
is there once.
"""

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import is_first
from qlora_lowmem.errors import DoesNotFitError
from qlora_lowmem.files import json_line, writing
from qlora_lowmem.memory.owners import Floor, floor_of
from qlora_lowmem.memory.profile import LiveMemory, read_live, write_live
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.units import GIB
from qlora_lowmem.watch.readings import is_running

LOG = "log.jsonl"
INTERVAL_SECONDS = 0.5
_LOGGED = ("loss", "grad_norm", "learning_rate", "epoch")


def quiet_libraries(*, bars: bool = True) -> None:
    """Keep the libraries' own notes off the screen, without `bars` their bars too: what matters of them we say once."""
    warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|torch|accelerate)\b")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if not bars:
        transformers.logging.disable_progress_bar()


class Progress(TrainerCallback):
    """What is told of a job; `watch` shows it the job before training begins."""

    _job: Any = None
    _recorder: Recorder | None = None
    _seen: tuple[float, float] | None = None

    def watch(self, job: Any, recorder: Recorder | None) -> None:
        """The job, and the recorder whose readings are told; None on a CPU."""
        self._job, self._recorder = job, recorder

    def _tokens_per_second(self, tokens: float) -> float | None:
        """Since the log line before; None for the first, for a resumed run has tokens from before."""
        seen, self._seen = self._seen, (tokens, time.perf_counter())
        return None if seen is None else (tokens - seen[0]) / (self._seen[1] - seen[1])


class ProgressLine(Progress):
    """A progress bar on standard error, with the time left: `loss 2.31, lr 2e-04, |g| 0.81, 410 tok/s, VRAM ...`.

    On a virtual GPU neither losses nor speeds exist, so it shows the memory alone.
    """

    def __init__(self, *, real_values: bool, quiet: bool = False) -> None:
        self._real_values = real_values
        self._quiet = quiet
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=self._quiet
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._bar is None or logs is None or "loss" not in logs:
            return
        parts = []
        if self._real_values:
            parts += [f"loss {logs['loss']:.3f}", f"lr {logs['learning_rate']:.1e}"]
            if "grad_norm" in logs:
                parts.append(f"|g| {logs['grad_norm']:.2f}")
            speed = self._tokens_per_second(float(logs["num_tokens"]))
            if speed is not None:
                parts.append(f"{speed:,.0f} tok/s")
        if self._recorder is not None:
            used, peak = torch.cuda.memory_allocated(self._recorder.index) / GIB, self._recorder.peak().device / GIB
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            parts.append(f"VRAM {used:.2f} GiB (peak {peak:.2f}, headroom {total - peak:.2f})")
        self._bar.set_postfix_str(", ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


class LogFile(Progress):
    """Writes the log. A disk that is full loses lines, which `say` tells once, and stops no training."""

    def __init__(self, output_dir: Path, say: Callable[[str], Any]) -> None:
        self._path = output_dir / LOG
        self._say = say
        self._told = False
        self._step = 0
        self._fixed: Floor | None = None
        self._begun = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the log back to the step that training goes on from."""
        self._step = state.global_step
        evaluated = any("eval_loss" in entry and entry["step"] == self._step for entry in state.log_history)
        with writing("the log", self._path):
            keep_until(self._path, self._step, evaluated=evaluated)
        self._begun = (state.global_step, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            line = {"step": state.global_step, "epoch": logs.get("epoch"), "eval_loss": logs["eval_loss"]}
        elif "loss" in logs:
            line = {"step": state.global_step, "steps": state.max_steps}
            line |= {name: logs[name] for name in _LOGGED if name in logs}
            line |= self._pace(state, float(logs["num_tokens"]))
            if self._recorder is not None and self._job is not None:
                line["vram"] = self._vram(self._recorder)
        else:
            return
        self._step = state.global_step
        self._write(line | {"time": time.time()})

    def note(self, content: dict[str, Any]) -> None:
        """Write a line of another kind, under the last step that is there."""
        self._write({"step": self._step} | content | {"time": time.time()})

    def _pace(self, state: Any, tokens: float) -> dict[str, Any]:
        first, began = self._begun
        speed = self._tokens_per_second(tokens)
        a_step = (time.perf_counter() - began) / max(state.global_step - first, 1)
        pace: dict[str, Any] = {"tokens": int(tokens)}
        pace |= {} if speed is None else {"tokens_per_second": round(speed, 1)}
        return pace | {"seconds_left": round(a_step * (state.max_steps - state.global_step), 1)}

    def _vram(self, recorder: Recorder) -> dict[str, int]:
        """Bytes by kind at the peak since the last step began."""
        fixed = self._fixed = self._fixed or floor_of(self._job.model, self._job.trainer.optimizer, 0)
        peak = recorder.peak()
        return {
            "weights": fixed.weights,
            "adapters_and_optimizer": fixed.adapters,
            "activations_and_workspaces": peak.allocated - fixed.weights - fixed.adapters,
            "allocator_slack": peak.reserved - peak.allocated,
            "outside_allocator": peak.device - peak.reserved,
        }

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                end, content = file.tell(), json_line(line).encode()
                if file.write(content) < len(content):
                    file.truncate(end)  # no half line
                os.fsync(file)
        except OSError as error:
            if not self._told:
                self._told = True
                self._say(f"{self._path} cannot be written ({error.strerror}); training goes on without")


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cut a log after its last line of `step` or earlier, and before the first line that is torn.

    Where the evaluation of `step` is not `evaluated` to its end, it comes again, and its line goes too.
    """
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
                again = not evaluated and content["step"] == step and "eval_loss" in content
                if not line.endswith(b"\n") or content["step"] > step or again:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


class Heartbeat(Progress):
    """Reads the allocator's counters after each micro-batch and writes them to `memory.json`, twice a second at most.

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
        self._written = 0.0

    def __enter__(self) -> "Heartbeat":
        self._beat(now=True, phase="loading")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        outcome = (
            "done"
            if error is None
            else "interrupted"
            if isinstance(error, KeyboardInterrupt | SystemExit)
            else "failed"
        )
        outcome = "out of GPU memory" if isinstance(error, DoesNotFitError) else outcome
        self._beat(now=True, phase="ended", outcome=outcome)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat(now=True, phase="training", step=state.global_step, steps=state.max_steps)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        own = (found.pid, found.started) == (self._live.pid, self._live.started)
        return not own and found.phase != "ended" and is_running(found.pid, found.started)

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
