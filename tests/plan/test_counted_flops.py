"""FLOPs of a step, asked by a plan: checkpointing runs each layer forward once more."""

import json
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.kept_runs import RunCache, Runs, Tally
from qlora_lowmem.plan.recipe_runs import two_steps
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.virtual_gpu import Server, get_card

CARD = get_card("rtx-3060-laptop-6gb")


def test_of_a_whole_step_on_a_virtual_card(tiny_hybrid: Path, recipe_runs: Server) -> None:
    """Without checkpointing, and with it: every layer's forward comes on top, and nothing else."""
    config = json.loads((tiny_hybrid / "config.json").read_text())
    plain = replace_fields(
        load_recipe(RECIPES / "optimised.yaml"),
        {"model": str(tiny_hybrid), "max_seq_length": 64, "gradient_checkpointing": False},
    )
    checkpointed = replace_fields(plain, {"gradient_checkpointing": True})
    wrong = replace_fields(plain, {"target_modules": ("no_such_layer",)})
    runs = Runs(recipe_runs, RunCache(None))
    both = [runs.count_flops(recipe, CARD, Tally()) for recipe in (plain, checkpointed)]
    fails = runs.count_flops(wrong, CARD, Tally())
    once, twice = (future.result() for future in both)
    head = 2 * 64 * config["hidden_size"] * config["vocab_size"]
    assert once > 3 * head, "forward, once more in the fused loss, and its gradient"
    assert once < twice < 2 * once
    with pytest.raises(QloraLowmemError, match=r"counting FLOPs failed.*no_such_layer"):
        fails.result()


def test_a_counted_run_says_what_a_run_for_it_alone_does(tiny_hybrid: Path, recipe_runs: Server) -> None:
    asked = {"model": str(tiny_hybrid), "max_seq_length": 64, "gradient_accumulation_steps": 2}
    recipe = load_recipe(RECIPES / "optimised.yaml", asked)
    alone, together, tally = Runs(recipe_runs, RunCache(None)), Runs(recipe_runs, RunCache(None)), Tally()
    for each in (recipe, replace_fields(recipe, {"lean": True})):
        counted = together.submit(two_steps(each), CARD, tally, "counted run")
        assert together.count_flops(each, CARD, tally).result() == alone.count_flops(each, CARD, Tally()).result()
        assert counted.result().flops
    assert tally.asked == 2
    wide = replace_fields(recipe, {"batch_size": 2})
    assert not together.submit(two_steps(wide), CARD, tally, "counted run").result().flops, "a sample is counted"
