"""The table of step times."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result


@dataclass(frozen=True)
class Speed:
    """Seconds that an optimizer step takes, over the timed steps, and tokens that it trains on."""

    recipe: str
    max_seq_length: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    tokens: int
    steps: int
    median_seconds: float
    fastest_seconds: float
    slowest_seconds: float

    @classmethod
    def of(cls, recipe: Recipe, tokens: int, seconds: Sequence[float]) -> "Speed":
        """From the timed steps.

        Raises:
            ValueError: none were timed.
        """
        if not seconds:
            raise ValueError(f"{recipe.name}: no step was timed")
        return cls(
            recipe.name,
            recipe.batch.max_seq_length,
            recipe.batch.gradient_accumulation_steps,
            recipe.memory.gradient_checkpointing,
            tokens,
            len(seconds),
            statistics.median(seconds),
            min(seconds),
            max(seconds),
        )

    @property
    def tokens_per_second(self) -> float:
        """By the median step."""
        return self.tokens / self.median_seconds


def write_speed(folder: Path, speeds: Sequence[Speed], record: dict[str, Any]) -> None:
    """Write `speed.json`, `.md` and `.csv` into `folder`."""
    rows = [asdict(each) | {"tokens_per_second": round(each.tokens_per_second, 1)} for each in speeds]
    headers = (
        "recipe",
        "seq",
        "accumulation",
        "ckpt",
        "tokens a step",
        "median s",
        "fastest s",
        "slowest s",
        "tokens/s",
    )
    cells = [
        [
            each.recipe,
            str(each.max_seq_length),
            str(each.gradient_accumulation_steps),
            "yes" if each.gradient_checkpointing else "no",
            str(each.tokens),
            f"{each.median_seconds:.3f}",
            f"{each.fastest_seconds:.3f}",
            f"{each.slowest_seconds:.3f}",
            f"{each.tokens_per_second:.0f}",
        ]
        for each in speeds
    ]
    markdown = (
        f"# Speed on {record['device']}\n\n"
        "Seconds an optimizer step, **measured** on the GPU in one process; a recipe that does not fit has no row.\n\n"
        f"{markdown_table(headers, cells)}\n\n{provenance_lines(record)}\n"
    )
    write_result(folder, "speed", {"environment": record, "rows": rows}, markdown, rows)
