"""A run whose loss, gradients or weights are no finite numbers any more: it is stopped, and its checkpoints stay."""

import math
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS
from qlora_lowmem.run_folder.checkpoints import newest_whole

# Under fp16 a step whose gradients overflow is skipped and the loss scale halved, from 2^16: that is no divergence
# until there is nothing left to halve (torch/amp/grad_scaler.py).
_SKIPPED_AT_MOST = 24


class DivergedError(UsageError):
    """The training cannot be gone on with as it is configured."""


class DivergenceCheck:
    """Looks at each step's figures before they are logged or anything is saved of them.

    Args:
        gradient_release: the gradients are gone by then, so their norm is not known.
    """

    def __init__(self, output_dir: Path, max_grad_norm: float, *, gradient_release: bool = False) -> None:
        self._output_dir = output_dir
        self._max_grad_norm = max_grad_norm
        self._gradient_release = gradient_release
        self._skipped = 0

    def step(self, step: int, loss: float, grad_norm: float | None, learning_rate: float | None, skipped: bool) -> None:
        """Args:
            loss: the sum since the last log line.
            skipped: whether the optimizer left the step out, as under fp16.

        Raises:
            DivergedError: loss or gradients are not finite.
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
        found = newest_whole(self._output_dir).checkpoint
        kept = f"{found.name} is the last that was saved, and its weights are finite" if found else "nothing was saved"
        rate = f" at learning rate {learning_rate:g}" if learning_rate is not None else ""
        clip = "" if 0 < self._max_grad_norm <= 1 else f" or optimizer.max_grad_norm 1.0 (now {self._max_grad_norm:g})"
        clip += ", which needs optimizer.gradient_release false" if self._gradient_release else ""
        raise DivergedError(
            f"training has diverged: {what} after step {step}{rate}; {kept}. Going on would diverge again, so start "
            "in another --output-dir with a lower optimizer.learning_rate (a tenth, say), more optimizer.warmup_steps, "
            f"a smaller lora.lora_alpha{clip}"
        )
