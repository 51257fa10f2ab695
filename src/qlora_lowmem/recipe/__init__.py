"""The recipe: what to train, said once; read from a file or a command line and checked before torch is imported."""

from .memory import Lean, Memory
from .sections import (
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
from .whole import SECTIONS, Recipe, hashed_fields, recipe_fields, recipe_hash

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
