"""The ladder: from the fastest to the leanest, and never against what a person has said."""

import pytest

from helpers import RECIPES
from qlora_lowmem.plan.ladder import ladder, rungs
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_fields

START = replace_fields(Recipe(name="start"), {"target_modules": "all-linear"})


def climb(recipe: Recipe, *, tiles: bool = True, fixed: frozenset[str] = frozenset(), climbing: bool = False) -> dict:
    return {rung.name: made for rung, made in ladder(recipe, tiles=tiles, fixed=fixed, climbing=climbing)}


@pytest.mark.parametrize("tiles", [True, False])
def test_every_rung_is_another_recipe_and_trains_the_same_layers(tiles: bool) -> None:
    found = climb(START, tiles=tiles)
    assert list(found) == [rung.name for rung in rungs(tiles=tiles)]
    assert len(set(found.values())) == len(found)
    assert {recipe.lora for recipe in found.values()} == {START.lora}
    assert {recipe.batch for recipe in found.values()} == {START.batch}


def test_what_changes_the_model_comes_last() -> None:
    found = list(climb(START).values())
    rounded = [recipe.lean.quantised_embeddings != "none" for recipe in found]
    assert rounded == sorted(rounded)
    checkpointed = [recipe.memory.gradient_checkpointing for recipe in found]
    assert checkpointed == sorted(checkpointed)
    assert not checkpointed[0]


def test_a_model_that_tiles_do_not_know_gets_none() -> None:
    assert not any(recipe.lean.lean for recipe in climb(START, tiles=False).values())


def test_what_was_said_on_the_command_line_stays() -> None:
    asked = replace_fields(START, {"expandable_segments": False, "checkpoints": "layer"})
    found = climb(asked, fixed=frozenset({"checkpoints"}))
    assert found
    assert {recipe.lean.checkpoints for recipe in found.values()} == {"layer"}
    assert climb(asked, fixed=frozenset({"expandable_segments"})) == {}, "every rung would change it"
    untouched = replace_fields(START, {"lora_r": 64})
    assert {recipe.lora.lora_r for recipe in climb(untouched, fixed=frozenset({"lora_r"})).values()} == {64}


def test_tiles_hold_the_same_bytes_whatever_kernels_a_machine_has() -> None:
    assert START.lean.scan == "auto"
    lean = [recipe for recipe in climb(START).values() if recipe.lean.lean]
    assert lean
    assert {recipe.lean.scan for recipe in lean} == {"plain"}
    kernels = climb(replace_fields(START, {"scan": "triton"}), fixed=frozenset({"scan"}))
    assert list(kernels) == [rung.name for rung in rungs(tiles=True)], "a person's own scan costs no rung"
    assert {recipe.lean.scan for recipe in kernels.values()} == {"triton"}


def test_a_batch_becomes_micro_batches_of_the_same_samples() -> None:
    asked = replace_fields(START, {"batch_size": 6, "gradient_accumulation_steps": 2})
    batches = {(recipe.batch.batch_size, recipe.batch.gradient_accumulation_steps) for recipe in climb(asked).values()}
    assert batches == {(1, 12)}
    kept = climb(asked, fixed=frozenset({"batch_size"}))
    assert {recipe.batch.batch_size for recipe in kept.values()} == {6}


RELEASED = {"gradient_release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


@pytest.mark.parametrize("tiles", [True, False])
def test_own_ways_of_adamw_end_where_another_optimizer_begins(tiles: bool) -> None:
    asked = replace_fields(START, RELEASED | {"optimizer_state_dtype": "fp32"})
    found = climb(asked, tiles=tiles)
    assert list(found) == [rung.name for rung in rungs(tiles=tiles)]
    *others, last = (recipe.optimizer for recipe in found.values())
    assert set(others) == {asked.optimizer}
    assert (last.optimizer, last.optimizer_state_dtype, last.gradient_release) == ("adamw_8bit", "auto", False)
    kept = climb(asked, tiles=tiles, fixed=frozenset({"gradient_release"}))
    assert list(kept) == list(found)[:-1]


def test_micro_batches_come_before_released_gradients_unless_these_are_asked_for() -> None:
    asked = replace_fields(START, RELEASED | {"batch_size": 4})
    found = list(climb(asked).values())
    assert {(each.batch.batch_size, each.optimizer.gradient_release) for each in found} == {(1, False)}
    kept = list(climb(asked, fixed=frozenset({"gradient_release"})).values())
    assert kept
    assert {(each.batch.batch_size, each.optimizer.gradient_release) for each in kept} == {(4, True)}


def test_climbing_leaves_out_what_keeps_more() -> None:
    lean = load_recipe(RECIPES / "lean.yaml")
    assert "fastest" not in climb(load_recipe(RECIPES / "optimised.yaml"), climbing=True)
    assert all(recipe.lean.lean for recipe in climb(lean, climbing=True).values())
    assert "fastest" in climb(load_recipe(RECIPES / "baseline.yaml"), climbing=True), "without the full logits"


def test_a_contradiction_leaves_a_rung_out() -> None:
    asked = replace_fields(START, {"tile_length": 64})
    assert list(climb(asked)) == [rung.name for rung in rungs(tiles=True)]
    full = replace_fields(START, {"loss": "full"})
    assert climb(full, fixed=frozenset({"loss"})) == {}
