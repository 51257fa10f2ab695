"""What ends a run before its last step: a signal, or figures that are no finite numbers any more.

SIGINT and SIGTERM: the first ends the run after the current step, with a checkpoint; a second ends it at once. A run
that has diverged is stopped, and its checkpoints stay.
"""

import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from transformers import TrainerCallback

from qlora_lowmem.environment import processes
from qlora_lowmem.errors import StoppedBySignal, UsageError
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS
from qlora_lowmem.run_folder.checkpoints import newest_complete

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Under fp16 a step whose gradients overflow is skipped and the loss scale halved, from 2^16: that is no divergence
# until there is nothing left to halve (torch/amp/grad_scaler.py).
_SKIPPED_AT_MOST = 24


class StopEvaluation(Exception):
    """Raised out of an evaluation that a signal cuts short; the trainer catches it."""


class Interruption(TrainerCallback):
    """Takes the two signals while training runs. Before and after, they end the process as they always do.

    A context around the run: whatever ends it, the handlers that were there are put back.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._evaluation_missing = False

    def __enter__(self) -> "Interruption":
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step that ran when the signal came is done: save it, and stop, in every process after the same step."""
        if self._agreed():
            control.should_save = args.save_strategy != "no"
            self._evaluation_missing = control.should_evaluate
            control.should_evaluate = False
            control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is not waited for: it comes when the run is gone on with (`trainer.py`)."""
        if self._agreed():
            self._evaluation_missing = True
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
            raise StopEvaluation

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal that comes while a checkpoint is written needs no further step."""
        if self._agreed():
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()

    def check(self, state: Any, output_dir: Path | None) -> None:
        """After training, which is saved if `output_dir` is given.

        Raises:
            StoppedBySignal: a signal ended it before its last step, or before that step's evaluation.
        """
        step, steps = state.global_step, state.max_steps
        if self._received is None or (step >= steps and not self._evaluation_missing):
            return
        saved = f"saved in {output_dir}; start the same command again to go on" if output_dir else "not saved"
        where = f"after step {step} of {steps}" + (", before its evaluation" if self._evaluation_missing else "")
        message = f"stopped by {self._received.name} {where}: {saved}"
        raise StoppedBySignal(message, 128 + self._received)

    def _agreed(self) -> bool:
        """Whether a signal has come; to any of several processes, asked of all at the same point."""
        if processes() == 1:
            return self._received is not None
        found = next(filter(None, gather_object([self._received])), None)
        if found is not None:
            self._received = found
        return found is not None  # what comes to this one meanwhile is told at the next point

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            _write(f"{signal.Signals(number).name} again: stopping at once")
            os._exit(128 + number)
        self._received = signal.Signals(number)
        _write(f"{self._received.name}: stopping after this step, with a checkpoint; once more stops at once")

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _write(text: str) -> None:
    """To standard error, past Python's buffers: a handler may run in the midst of another write to them."""
    with suppress(OSError):  # a full disk ends no training
        os.write(2, f"\n{text}\n".encode())


class DivergedError(UsageError):
    """The training cannot be gone on with as it is configured."""


class DivergenceCheck:
    """Looks at each step's figures before they are logged or anything is saved of them."""

    def __init__(self, output_dir: Path, max_grad_norm: float, *, gradient_release: bool = False) -> None:
        self._output_dir = output_dir
        self._max_grad_norm = max_grad_norm
        self._gradient_release = gradient_release
        self._skipped = 0

    def step(self, step: int, loss: float, grad_norm: float | None, learning_rate: float | None, skipped: bool) -> None:
        """Raise `DivergedError` if `loss`, the sum since the last log line, or the gradients are not finite.

        Args:
            skipped: whether the optimizer left the step out, as under fp16.
        """
        bad_gradients = grad_norm is not None and not math.isfinite(grad_norm)
        self._skipped = self._skipped + 1 if skipped else 0
        if math.isfinite(loss) and (not bad_gradients or (skipped and self._skipped <= _SKIPPED_AT_MOST)):
            return
        figures = [f"the loss is {loss}"] if not math.isfinite(loss) else []
        figures += [f"the gradient norm is {grad_norm}"] if bad_gradients else []
        self._refuse(" and ".join(figures), step, learning_rate)

    def weights(self, folder: Path, step: int, learning_rate: float | None) -> None:
        """Look at an adapter that was written into `folder` and is not in its place yet. On the host, so that it takes
        no GPU memory; sharded weights, which are in other files, are not looked at.

        Raises:
            DivergedError: it holds values that are not finite.
        """
        path = folder / ADAPTER_WEIGHTS
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if not bool(torch.isfinite(file.get_tensor(name)).all()):
                    self._refuse(f"the adapter's weights are not finite ({name})", step, learning_rate)

    def _refuse(self, what: str, step: int, learning_rate: float | None) -> NoReturn:
        found = newest_complete(self._output_dir).checkpoint
        kept = f"{found.name} is the last that was saved, and its weights are finite" if found else "nothing was saved"
        rate = f" at learning rate {learning_rate:g}" if learning_rate is not None else ""
        clip = "" if 0 < self._max_grad_norm <= 1 else f" or optimizer.max_grad_norm 1.0 (now {self._max_grad_norm:g})"
        clip += ", which needs optimizer.gradient_release false" if self._gradient_release else ""
        raise DivergedError(
            f"training has diverged: {what} after step {step}{rate}; {kept}. Going on would diverge again, so start "
            "in another --output-dir with a lower optimizer.learning_rate (a tenth, say), more optimizer.warmup_steps, "
            f"a smaller lora.lora_alpha{clip}"
        )
