"""`log.jsonl` in the output folder: one JSON object for each logged step, for a program that follows a run.

    {"step": 12, "epoch": 0.4, "loss": 2.31, "grad_norm": 0.8, "learning_rate": 0.0002, "tokens": 9812,
     "tokens_per_second": 410.2, "seconds_left": 84.1, "vram": {"allocated": ..., ...}, "time": 1763990000.0}
    {"step": 20, "eval_loss": 2.2, ...}
    {"step": 21, "out_of_memory": "steady", "retreat": {"lean": true}, ...}

A line is on the disk before training goes on. A run that is resumed drops what was logged after its checkpoint, so a
step is there once.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qlora_lowmem.files import json_line, writing
from qlora_lowmem.memory.owners import Floor, floor_of
from qlora_lowmem.memory.recorder import Recorder

LOG = "log.jsonl"
_KEPT = ("loss", "grad_norm", "learning_rate", "epoch")


class LogFile(TrainerCallback):
    """Writes the log. A disk that is full loses lines, said once, and stops no training.

    Args:
        output_dir: the folder of the run.
        say: tells the user what goes wrong.
    """

    def __init__(self, output_dir: Path, say: Any) -> None:
        self._path = output_dir / LOG
        self._say = say
        self._told = False
        self._step = 0
        self._job: Any = None
        self._recorder: Recorder | None = None
        self._fixed: Floor | None = None
        self._begun = (0, 0.0)
        self._seen: tuple[float, float] | None = None

    def watch(self, job: Any, recorder: Recorder | None) -> None:
        """The job and the recorder whose readings are logged; None on a CPU."""
        self._job, self._recorder = job, recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the log back to the step that training goes on from."""
        self._step = state.global_step
        evaluated = any("eval_loss" in entry and entry["step"] == self._step for entry in state.log_history)
        with writing("the log", self._path):
            keep_until(self._path, self._step, evaluated=evaluated)
        self._begun = (state.global_step, time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a line, if there is a loss to write."""
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            line = {"step": state.global_step, "epoch": logs.get("epoch"), "eval_loss": logs["eval_loss"]}
        elif "loss" in logs:
            line = {"step": state.global_step, "steps": state.max_steps}
            line |= {name: logs[name] for name in _KEPT if name in logs} | self._pace(state, logs)
            if self._recorder is not None and self._job is not None:
                line["vram"] = self._vram(self._job, self._recorder)
        else:
            return
        self._step = state.global_step
        self._write(line | {"time": time.time()})

    def note(self, content: dict[str, Any]) -> None:
        """Write a line of another kind, under the last step that is there."""
        self._write({"step": self._step} | content | {"time": time.time()})

    def _pace(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        now, tokens = time.perf_counter(), float(logs["num_tokens"])
        first, began = self._begun
        a_step = (now - began) / max(state.global_step - first, 1)
        pace: dict[str, Any] = {"tokens": int(tokens)}
        if self._seen is not None:
            before, then = self._seen
            pace["tokens_per_second"] = round((tokens - before) / (now - then), 1)
        self._seen = (tokens, now)
        return pace | {"seconds_left": round(a_step * (state.max_steps - state.global_step), 1)}

    def _vram(self, job: Any, recorder: Recorder) -> dict[str, int]:
        """Bytes by kind at the peak since the last step began."""
        if self._fixed is None:
            self._fixed = floor_of(job.model, job.trainer.optimizer, 0)
        allocated, reserved, outside = recorder.peak_bytes()
        return {
            "weights": self._fixed.weights,
            "adapters_and_optimizer": self._fixed.adapters,
            "activations_and_workspaces": allocated - self._fixed.weights - self._fixed.adapters,
            "allocator_slack": reserved - allocated,
            "outside_allocator": outside,
        }

    def _write(self, line: dict[str, Any]) -> None:
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                end = os.fstat(handle).st_size
                content = json_line(line).encode()
                if os.write(handle, content) < len(content):
                    os.ftruncate(handle, end)  # no half line
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if not self._told:
                self._told = True
                self._say(f"{self._path} cannot be written ({error.strerror}); training goes on without")


def keep_until(path: Path, step: int, *, evaluated: bool = True) -> None:
    """Cut a log after its last line of `step` or earlier, and before the first line that is torn.

    Args:
        evaluated: whether the evaluation of `step` is done; else it comes again, and its line goes too.
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
