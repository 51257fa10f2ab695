"""What a run must have again, besides weights and optimizer, to go on as if it had not been disturbed.

The random generators; the order of the samples; and what the trainers keep only in memory between two log lines:
transformers sums the loss since the last one, TRL its metrics, and TRL counts tokens from the process's start. Neither
puts them into a checkpoint.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler

from qlora_lowmem.environment import processes, rank
from qlora_lowmem.run_folder.ownership import TOTALS

# Up to here the trainer's own RandomSampler keeps its list: at most 40 MiB.
LISTED_SAMPLES = 2**20
_ROUNDS = 4


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


@dataclass(frozen=True)
class RunningTotals:
    """What the trainers count.

    Attributes:
        loss: sum of this process' losses since the last log line, as torch holds it (fp32).
        logged_step: the step of that line.
        metrics: TRL's values since then, by name; equal in all processes.
        tokens: trained on since the run began, in all processes.
    """

    loss: torch.Tensor
    logged_step: int
    metrics: dict[str, list[float]]
    tokens: int

    @classmethod
    def of(cls, trainer: Any) -> "RunningTotals":
        """The totals of a trainer that trains. Waits for no GPU."""
        return cls(
            trainer._tr_loss.clone(),
            trainer._globalstep_last_logged,
            {name: list(values) for name, values in trainer._metrics["train"].items()},
            trainer._total_train_tokens,
        )

    def restore(self, trainer: Any) -> None:
        """Make them those of `trainer`."""
        trainer._tr_loss = self.loss.to(trainer._tr_loss)
        trainer._globalstep_last_logged = self.logged_step
        trainer._metrics["train"] = defaultdict(list, {name: list(values) for name, values in self.metrics.items()})
        trainer._total_train_tokens = self.tokens

    def save(self, checkpoint: Path) -> None:
        """Write those of all processes into a checkpoint: called by all of them, written by the first."""
        loss = [self.loss.item()]  # an fp32 number is exact as the decimal of JSON
        saved = {
            "losses": gather_object(loss) if processes() > 1 else loss,
            "logged_step": self.logged_step,
            "metrics": self.metrics,
            "tokens": self.tokens,
        }
        if rank() == 0:
            (checkpoint / TOTALS).write_text(json.dumps(saved) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> "RunningTotals":
        """The inverse of `save`. Where another number of processes goes on, each takes the mean, which is logged."""
        saved = json.loads((checkpoint / TOTALS).read_text(encoding="utf-8"))
        losses = saved.pop("losses")
        loss = losses[rank()] if len(losses) == processes() else sum(losses) / len(losses)
        return cls(torch.tensor(loss), **saved)


class ComputedOrder(Sampler[int]):
    """Every index below `count` once, in an order that seed and epoch decide, with constant memory.

    A Feistel network over pairs of half-words permutes the indices of the next even power of two (Luby and Rackoff
    1988: four rounds); those from `count` on are sent through again until they fall below it (cycle walking, Black and
    Rogaway 2002, section 3), at most four times on average.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0
        self._half_bits = max(1, (max(1, count - 1).bit_length() + 1) // 2)

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """The pass over the data that the next iteration is."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        digest = hashlib.sha256(f"{self._seed} {self._epoch}".encode()).digest()
        keys = [int.from_bytes(digest[8 * part : 8 * part + 8], "little") | 1 for part in range(_ROUNDS)]
        for index in range(self._count):
            place = self._permuted(index, keys)
            while place >= self._count:
                place = self._permuted(place, keys)
            yield place

    def _permuted(self, index: int, keys: list[int]) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in keys:
            # The high half of a 64-bit product depends on every bit of `right`.
            mixed = ((right + 1) * key ^ key >> 17) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 29) & mask)
        return left << self._half_bits | right
