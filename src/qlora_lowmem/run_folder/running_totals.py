"""What the trainers keep only in memory between two log lines, so that a resumed run logs what an undisturbed one logs.

transformers sums the loss since the last log line, TRL its metrics, and TRL counts tokens from the process's start;
neither puts them into a checkpoint.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from qlora_lowmem.environment import processes, rank
from qlora_lowmem.run_folder.ownership import TOTALS


@dataclass(frozen=True)
class RunningTotals:
    """Attributes:
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
        """Write those of all processes into a checkpoint: called by all of them, written by the first.

        An fp32 number is exact as the decimal that JSON writes.
        """
        losses = [self.loss.item()]
        if processes() > 1:
            losses = gather_object(losses)
        if rank() == 0:
            content = {"losses": losses, "logged_step": self.logged_step, "metrics": self.metrics}
            (checkpoint / TOTALS).write_text(json.dumps(content | {"tokens": self.tokens}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> "RunningTotals":
        """The inverse of `save`. What is logged is the mean of all processes: where another number of them goes on,
        each takes the mean.
        """
        content = json.loads((checkpoint / TOTALS).read_text(encoding="utf-8"))
        losses = content.pop("losses")
        loss = losses[rank()] if len(losses) == processes() else sum(losses) / len(losses)
        return cls(torch.tensor(loss), **content)
