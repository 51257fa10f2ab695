"""The state of every random generator that a step may draw from, kept and given back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """Python's, NumPy's and torch's generators; `cuda` is that of the current GPU, None where none is in use."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """The generators as they are. On a GPU nothing is waited for: seed and offset are kept on the host."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside is not missed outside: training goes on as if it had not run."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()
