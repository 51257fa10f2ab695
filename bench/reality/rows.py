"""The published rows, the recipe of each, and what else was looked at and cannot be a recipe."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matrix_recipes import RECIPES
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe

HERE = Path(__file__).parent
FITCHECK, PEFT = "fitcheck", "PEFT's method comparison"
FMS, FMS_LATER = "fms-acceleration", "fms-acceleration, transformers 4.48"
FACTORY, UNSLOTH = "LLaMA-Factory", "Unsloth's table, HF + FA2"

Measures = Literal["allocated", "reserved", "device", "limit", "out of memory"]

# (what was published, why it is not a row)
NOT_A_RECIPE = (
    (
        "PEFT's method comparison, every method but LoRA (ln_tuning, DoRA, VeRA, ...)",
        "a recipe trains LoRA adapters only; ln_tuning is run as a program in published-finetuning.md",
    ),
    (
        "fms-acceleration, baseline-peft-bnb, foak, liger and autogptq rows; two or four GPUs",
        "fp32 upcast of the base by TRL 0.11, fused kernels, GPTQ weights, FSDP: none is a field of a recipe",
    ),
    (
        "fms-acceleration, PowerLM-3B, Mixtral-8x7B, Llama-2-70B, santacoder",
        "their configurations are not at hand offline, or the runs ended out of memory without a peak",
    ),
    (
        "LLaMA-Factory, the tables at a maximum length of 1,024 on alpaca data",
        "how long the longest batch really was is not published",
    ),
    ("LLaMA-Factory's and Unsloth's own columns (Unsloth kernels)", "other kernels than this stack's"),
    ("Unsloth's table, 8 GB: out of memory", "at which length is not said"),
    (
        "litgpt's tables (StableLM-3B, Llama-2-7B on alpaca, micro-batch 4)",
        "litgpt's own model code, and the longest batch is not published",
    ),
    (
        "the bitsandbytes announcement's table (LLaMA-7B and 13B on a T4: out of memory or not)",
        "rank and adapted modules are in a script that is not at hand, and bf16 on a T4 is refused by a recipe",
    ),
    (
        "QLoRA, section 2 (LLaMA-7B, FLAN v2, batch 1: 5,048 MB of base, 567 MB or 18 MB of input gradients)",
        "parts of a peak at an unstated length, not a peak",
    ),
    ("LongLoRA, table 12 (Llama-2-7B, 8 A100s)", "DeepSpeed ZeRO-2 on eight cards is not a field of a recipe"),
)


@dataclass(frozen=True)
class PublishedPeak:
    """A peak of a fine-tuning run that others measured.

    Attributes:
        source: key of `table.SOURCES`.
        run: the run in words.
        model: a known one (`models/known.toml`).
        card: in the table of cards.
        changes: the recipe's fields.
        measures: what the figure is.
        measured_bytes: the figure; for a limit or an out of memory, the card's memory as it is sold.
        low_bytes, high_bytes: bounds of a figure that was published rounded.
        loaded_bytes: allocated after loading, where that was published.
        versions: of the packages it was measured with, where stated.
    """

    source: str
    run: str
    model: str
    card: str
    changes: Mapping[str, Any]
    measures: Measures
    measured_bytes: int
    low_bytes: int | None
    high_bytes: int | None
    loaded_bytes: int | None
    versions: str

    @property
    def key(self) -> str:
        """Equal for rows of one run of one recipe."""
        return f"{self.model} on {self.card}: {json.dumps(self.changes, sort_keys=True)}"

    @property
    def name(self) -> str:
        """What tells the row from every other."""
        return f"{self.source}: {self.run} ({self.measures}, {self.versions or 'versions not stated'})"

    @property
    def architecture(self) -> dict[str, Any]:
        """The content of the model's `config.json`."""
        return resolve_model(self.model, "random").architecture or {}

    @property
    def recipe(self) -> Recipe:
        """The run as a recipe, on synthetic samples that are all as long as the run's."""
        common = {"model": self.model, "gradient_accumulation_steps": 1, "adapter_dtype": "fp32", "name": "published"}
        return load_recipe(RECIPES / "baseline.yaml", common | dict(self.changes))


def published_peaks() -> list[PublishedPeak]:
    """Every row of `measured.csv`."""
    with (HERE / "measured.csv").open(encoding="utf-8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> PublishedPeak:
    def optional(name: str) -> int | None:
        return int(line[name]) if line[name] else None

    measures: Any = line["measures"]
    return PublishedPeak(
        source=line["source"],
        run=line["run"],
        model=line["model"],
        card=line["card"],
        changes=json.loads(line["changes"]),
        measures=measures,
        measured_bytes=int(line["measured_bytes"]),
        low_bytes=optional("low_bytes"),
        high_bytes=optional("high_bytes"),
        loaded_bytes=optional("loaded_bytes"),
        versions=line["versions"],
    )
