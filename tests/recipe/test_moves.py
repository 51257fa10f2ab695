"""The one table of moves: what it says of each is what the recipe made of it shows."""

import itertools

import pytest

from helpers import RECIPES
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.recipe.moves import changes_of, keeps_training, moves

# A recipe that has made no move at all, and one that has made all that can be made together.
PLAIN = {"gradient_checkpointing": False, "loss": "full", "attention": "eager", "load_in_4bit": False, "batch_size": 8}
LEAN = {"lean": True, "expandable_segments": True}
STARTS = [replace_fields(Recipe(name="start"), fields) for fields in (PLAIN, LEAN, LEAN | {"checkpoints": "layer"})]
STARTS += [load_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))]


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("recipe", STARTS, ids=lambda recipe: recipe.name)
def test_what_is_exact_keeps_training_and_nothing_else_does(recipe: Recipe, tiles: bool) -> None:
    for change in changes_of(recipe, tiles=tiles):
        exact = change.move.kind != "changes training"
        # One sample alone is exact with an accumulation that its words name.
        assert change.keeps_training == (exact and "exact with" not in change.move.cost)
        assert not change.move.cost.startswith("exact") or exact


@pytest.mark.parametrize("recipe", STARTS, ids=lambda recipe: recipe.name)
def test_a_move_that_is_made_is_made(recipe: Recipe) -> None:
    """What it sets is there, it changed something, and nothing else, and it is not offered again as it was."""
    now = field_values(recipe)
    for change in changes_of(recipe, tiles=True):
        made = field_values(change.recipe)
        assert {leaf: made[leaf] for leaf in change.move.sets} == change.move.sets
        assert {leaf: made[leaf] for leaf in made if made[leaf] != now[leaf]} == change.changes != {}
        again = (each.changes for each in changes_of(change.recipe, tiles=True))
        assert change.changes not in again


def test_moves_are_what_fields_take_and_a_recipe_can_come_to_each() -> None:
    table = moves(Recipe(), tiles=True)
    assert len({move.name for move in table}) == len(table)
    assert {leaf for move in table for leaf in move.sets} <= field_specs().keys()
    offered = {change.move.name for recipe in STARTS for change in changes_of(recipe, tiles=True)}
    assert offered == {move.name for move in table}


def test_only_models_in_tiles_get_moves_of_tiles() -> None:
    changes = itertools.chain.from_iterable(changes_of(recipe, tiles=False) for recipe in STARTS)
    assert not any("lean" in change.changes or "checkpoints" in change.changes for change in changes)


def test_which_fields_may_differ_between_two_starts_of_a_run() -> None:
    kept = {leaf for leaf in field_specs() if keeps_training(leaf, same_samples=False)}
    assert {"lean", "attention", "max_memory", "pin_memory", "gradient_release", "eval_data"} <= kept
    assert not kept & {"learning_rate", "lora_r", "quantised_embeddings", "max_seq_length", "batch_size", "seed"}
    assert not kept & {"use_rslora", "exclude_modules", "warmup_ratio", "neftune_noise_alpha", "template"}
    assert {leaf for leaf in field_specs() if keeps_training(leaf, same_samples=True)} - kept == {
        "batch_size",
        "gradient_accumulation_steps",
    }
