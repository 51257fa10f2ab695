"""What the trainers keep only in memory between two log lines, so that a resumed run logs what an undisturbed one logs.

transformers sums the loss since the last log line, TRL its metrics, and TRL counts tokens from the process's start;
neither puts them into a checkpoint.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TOTALS = "totals.json"


@dataclass(frozen=True)
class RunningTotals:
    """Attributes:
    loss: sum of the steps' losses since the last log line, as torch holds it (fp32).
    logged_step: the step of that line.
    metrics: TRL's values since then, by name.
    tokens: trained on since the run began.
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
        """Write them into a checkpoint. An fp32 number is exact as the decimal that JSON writes."""
        content = asdict(self) | {"loss": self.loss.item()}
        (checkpoint / TOTALS).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path) -> "RunningTotals":
        """The inverse of `save`."""
        content = json.loads((checkpoint / TOTALS).read_text(encoding="utf-8"))
        return cls(**content | {"loss": torch.tensor(content["loss"])})
