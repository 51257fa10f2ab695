"""The recipe: what to train, said once; read from a file or a command line and checked before torch is imported."""

from qlora_lowmem.recipe.memory import Lean, Memory
from qlora_lowmem.recipe.recipe import SECTIONS, Recipe, hashed_fields, recipe_fields, recipe_hash
from qlora_lowmem.recipe.sections import (
    SYNTHETIC,
    TARGET_PRESETS,
    Base,
    Batch,
    Data,
    Dataloader,
    Lora,
    Optimizer,
    Quantization,
    Run,
    Schedule,
)

__all__ = [
    "SECTIONS",
    "SYNTHETIC",
    "TARGET_PRESETS",
    "Base",
    "Batch",
    "Data",
    "Dataloader",
    "Lean",
    "Lora",
    "Memory",
    "Optimizer",
    "Quantization",
    "Recipe",
    "Run",
    "Schedule",
    "hashed_fields",
    "recipe_fields",
    "recipe_hash",
]
