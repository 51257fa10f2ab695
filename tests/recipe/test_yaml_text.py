"""A recipe written for a person reads back as itself, and says what every knob does."""

from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.recipe import recipe_fields
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.recipe.yaml_text import commented_yaml


@pytest.mark.parametrize("shipped", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_reads_back_as_itself(shipped: Path, tmp_path: Path) -> None:
    recipe = load_recipe(shipped)
    path = tmp_path / shipped.name
    path.write_text(commented_yaml(recipe, ["one", "two"]), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_awkward_values_read_back(tmp_path: Path) -> None:
    changes = {
        "name": "mine",
        "model": "./a folder: #1",
        "revision": None,
        "target_modules": ("q_proj", "mamba.in_proj"),
        "learning_rate": 1e-5,
        "max_memory": "90%",
        "data": str(tmp_path / "true.jsonl"),
        "output_dir": "outputs/mine",
    }
    recipe = replace_fields(load_recipe(RECIPES / "lean.yaml"), changes)
    path = tmp_path / "mine.yaml"
    path.write_text(commented_yaml(recipe, []), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_every_knob_has_its_comment() -> None:
    text = commented_yaml(load_recipe(RECIPES / "lean.yaml"), ["Title."])
    lines = text.splitlines()
    assert lines[0] == "# Title."
    for section, each in recipe_fields():
        if section:
            (line,) = [line for line in lines if line.startswith(f"  {each.name}: ")]
            comment = line.split(" # ", 1)[1]
            assert comment
            assert comment != "none"
