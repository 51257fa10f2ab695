"""A small job on a CPU, run in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe


@pytest.fixture
def tiny_recipe(tiny_hybrid: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The optimised recipe on the tiny hybrid with dropout, on a CPU; changes by field, `output_dir` by name."""

    def make(output: str, **changes: Any) -> Recipe:
        small = {"model": str(tiny_hybrid), "device": "cpu", "max_seq_length": 24, "gradient_accumulation_steps": 2}
        small |= {"max_steps": 6, "save_steps": 1, "save_total_limit": 3, "lora_dropout": 0.1}
        return load_recipe(RECIPES / "optimised.yaml", small | changes | {"output_dir": str(tmp_path / output)})

    return make
