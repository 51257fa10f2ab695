"""Single changes of a recipe: what the flags say is what is tried, and each has a cost in words."""

import json
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.advice import candidate_changes, knobs_of
from qlora_lowmem.plan.asked import runs_in_tiles
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field, replace_fields
from qlora_lowmem.recipe.moves import Change
from qlora_lowmem.virtual_gpu import get_card


def flags_of(recipe: Recipe) -> dict[str, Change]:
    """The changes that are tried, by what they write on the command line."""
    return {" ".join(change.flags): change for change in candidate_changes(recipe, tiles=runs_in_tiles(recipe))}


@pytest.mark.parametrize("shipped", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_flags_make_the_recipe_that_is_tried(shipped: Path) -> None:
    recipe = load_recipe(shipped)
    changes = candidate_changes(recipe, tiles=True)
    assert changes
    assert len(flags_of(recipe)) == len(changes)
    for change in changes:
        given = dict(zip(change.flags[::2], change.flags[1::2], strict=True))
        assert load_recipe(shipped, given) == change.recipe
        assert change.recipe != recipe
        assert change.move.cost


def test_only_what_the_model_takes_is_proposed(tmp_path: Path) -> None:
    optimised = load_recipe(RECIPES / "optimised.yaml")
    assert "--lean true" in flags_of(optimised)
    llama = replace_field(optimised, "model", "llama-3.2-3b")
    assert "--lean true" in flags_of(llama)
    (tmp_path / "config.json").write_text(json.dumps(architecture("llama-3.2-3b") | {"hidden_act": "gelu"}))
    other = replace_fields(optimised, {"model": str(tmp_path), "weights": "random"})
    assert not any("lean" in flags for flags in flags_of(other))
    lean = set(flags_of(load_recipe(RECIPES / "lean.yaml")))
    assert {"--checkpoints host", "--quantised-embeddings 8bit", "--quantised-embeddings 4bit"} <= lean


def test_another_optimizer_takes_what_only_adamw_has_with_it() -> None:
    released = {"gradient_release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "batch_size": 4}
    recipe = load_recipe(RECIPES / "optimised.yaml", released | {"optimizer_state_dtype": "fp32"})
    found = flags_of(recipe)
    flags = "--optimizer adamw_8bit --optimizer-state-dtype auto --gradient-release false"
    assert not found[flags].recipe.optimizer.gradient_release
    one_by_one = "exact with --gradient-accumulation-steps 4 and --gradient-release false"
    assert found["--batch-size 1"].move.cost.startswith(one_by_one)


def run(needed: int | None) -> RecipeRun:
    peaks = {"steady": Peak(0, 0, needed or 0)}
    return RecipeRun(MemoryProfile("card", "virtual", 1, 0, peaks) if needed is not None else None, failure="none")


def test_what_saves_nothing_or_fails_is_left_out() -> None:
    card = get_card("rtx-4050-laptop-6gb")
    changes = candidate_changes(load_recipe(RECIPES / "optimised.yaml"), tiles=True)[:4]
    usable = card.usable_bytes
    runs = [run(usable + 1), run(usable + 9), run(None), run(usable)]
    knobs = knobs_of(run(usable + 9), changes, runs, card)
    assert [(knob.change, knob.saves_bytes, knob.fits) for knob in knobs] == [
        (" ".join(changes[3].flags), 9, True), (" ".join(changes[0].flags), 8, False),
    ]  # fmt: skip
