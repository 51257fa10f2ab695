"""What a person watches while training: loss, tokens/s and the card's memory, on one line."""

import time
import warnings
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback

from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.units import GIB


def quiet_libraries(*, bars: bool = True) -> None:
    """Keep the libraries' own notes off the screen: what matters of them is said once, by us.

    Args:
        bars: False for no progress bars of theirs either.
    """
    warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|torch|accelerate)\b")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if not bars:
        transformers.logging.disable_progress_bar()


class ProgressLine(TrainerCallback):
    """A progress bar on standard error, with the time left: `loss 2.31, lr 2e-04, |g| 0.81, 410 tok/s, VRAM ...`.

    On a virtual GPU neither losses nor speeds exist, so it shows the memory alone.
    """

    def __init__(self, *, real_values: bool, quiet: bool = False) -> None:
        self._real_values = real_values
        self._quiet = quiet
        self._recorder: Recorder | None = None
        self._bar: Any = None
        self._seen: tuple[float, float] | None = None

    def watch(self, recorder: Recorder | None) -> None:
        """The recorder whose readings are shown; None on a CPU."""
        self._recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=self._quiet
        )
        self._seen = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step further."""
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest figures."""
        if self._bar is None or logs is None or "loss" not in logs:
            return
        parts = []
        if self._real_values:
            parts.append(f"loss {logs['loss']:.3f}")
            parts.append(f"lr {logs['learning_rate']:.1e}")
            if "grad_norm" in logs:
                parts.append(f"|g| {logs['grad_norm']:.2f}")
            tokens, now = float(logs["num_tokens"]), time.perf_counter()
            if self._seen is not None:  # from the second log line on: a resumed run has tokens from before
                before, then = self._seen
                parts.append(f"{(tokens - before) / (now - then):,.0f} tok/s")
            self._seen = (tokens, now)
        if self._recorder is not None:
            parts.append(self._memory(self._recorder))
        self._bar.set_postfix_str(", ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()

    @staticmethod
    def _memory(recorder: Recorder) -> str:
        used, peak = recorder.live_bytes()
        total = torch.cuda.get_device_properties(0).total_memory
        return f"VRAM {used / GIB:.2f} GiB (peak {peak / GIB:.2f}, headroom {(total - peak) / GIB:.2f})"
