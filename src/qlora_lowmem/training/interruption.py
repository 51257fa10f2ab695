"""SIGINT and SIGTERM: the first ends the run after the current step, with a checkpoint; a second ends it at once."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from qlora_lowmem.environment import processes
from qlora_lowmem.errors import StoppedBySignal

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on there is a step to finish."""
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
        """Nothing is left to finish."""
        self._release()

    def check(self, step: int, steps: int, output_dir: Path | None) -> None:
        """To be called after training; `output_dir` is None where nothing is saved.

        Raises:
            StoppedBySignal: a signal ended it before its last step, or before that step's evaluation.
        """
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
    os.write(2, f"\n{text}\n".encode())
