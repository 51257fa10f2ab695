"""The ladder: from the fastest to the leanest, and never against what a person has said."""

import itertools

import pytest

from helpers import RECIPES
from qlora_lowmem.errors import UsageError
from qlora_lowmem.plan import ladder as ladder_module
from qlora_lowmem.plan.ladder import ladder
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.io import load_recipe, replace_fields

TILED = [
    "fastest", "checkpointing", "tiles", "tiles, segments", "tiles, host", "tiles, host, 8-bit embeddings",
    "tiles, host, 4-bit embeddings, 8-bit AdamW",
]  # fmt: skip
OTHER = ["fastest", "checkpointing", "offloading", "offloading, 8-bit AdamW"]
START = replace_fields(Recipe(name="start"), {"target_modules": "all-linear"})


def climb(recipe: Recipe, *, tiles: bool = True, fixed: frozenset[str] = frozenset(), climbing: bool = False) -> dict:
    return {rung.name: made for rung, made in ladder(recipe, tiles=tiles, fixed=fixed, climbing=climbing)}


@pytest.mark.parametrize("tiles", [True, False])
def test_every_rung_is_another_recipe_and_trains_the_same_layers(tiles: bool) -> None:
    found = climb(START, tiles=tiles)
    assert list(found) == (TILED if tiles else OTHER)
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


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({"attention": "eager"}, TILED),
        ({"expandable_segments": False}, TILED),
        ({"lora_r": 64}, TILED),
        ({"loss": "full"}, OTHER),
        ({"lean": False}, OTHER),
        ({"lean": True, "gradient_checkpointing": True}, TILED[2:]),
        ({"gradient_checkpointing": True}, TILED[1:]),
        ({"gradient_checkpointing": False}, ["fastest"]),
        ({"activation_offloading": True}, ["fastest", *OTHER[2:]]),
        ({"optimizer": "adamw_torch"}, [*TILED[:-1], "tiles, host, 4-bit embeddings"]),
        (
            {"checkpoints": "layer"},
            [*TILED[:3], "tiles, 8-bit embeddings", "tiles, 4-bit embeddings, 8-bit AdamW"],
        ),
        ({"checkpoints": "segments"}, [*TILED[:2], TILED[3], "tiles, 8-bit embeddings",
                                       "tiles, 4-bit embeddings, 8-bit AdamW"]),
        ({"quantised_embeddings": "none"}, [*TILED[:5], "tiles, host, 8-bit AdamW"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_said_on_the_command_line_stays(said: dict, names: list[str]) -> None:
    """Rungs own only the fields that are their idea; of a rung, what contradicts what was said is left out."""
    asked = replace_fields(START, said)
    found = climb(asked, fixed=frozenset(said))
    assert list(found) == names
    for recipe in found.values():
        made = field_values(recipe)
        assert {leaf: made[leaf] for leaf in said} == said
    assert len(set(found.values())) == len(found)


CHOICES = {
    "attention": ("eager", "sdpa"),
    "loss": ("full", "fused"),
    "optimizer": ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
    "quantised_embeddings": ("none", "8bit", "4bit"),
    "checkpoints": ("layer", "segments", "host"),
    "gradient_release": (False, True),
    "batch_size": (1, 4),
} | dict.fromkeys(("gradient_checkpointing", "activation_offloading", "expandable_segments", "lean"), (False, True))


@pytest.mark.parametrize("tiles", [True, False])
def test_whatever_a_recipe_may_say_there_is_a_rung(tiles: bool) -> None:
    for first, second in itertools.combinations(CHOICES, 2):
        for values in itertools.product(CHOICES[first], CHOICES[second]):
            said = {first: values[0], second: values[1]}
            try:
                asked = replace_fields(START, said)
            except UsageError:
                continue
            found = climb(asked, tiles=tiles, fixed=frozenset(said))
            assert found, said
            assert all(field_values(recipe)[leaf] == said[leaf] for recipe in found.values() for leaf in said)


def test_an_empty_ladder_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder_module, "_OTHER", (("fastest",),))
    asked = replace_fields(START, {"gradient_checkpointing": True, "lora_r": 4})
    with pytest.raises(UsageError, match="no recipe of the ladder goes with --gradient-checkpointing True; leave"):
        climb(asked, tiles=False, fixed=frozenset({"gradient_checkpointing", "lora_r"}))


def test_tiles_hold_the_same_bytes_whatever_kernels_a_machine_has() -> None:
    assert START.lean.scan == "auto"
    lean = [recipe for recipe in climb(START).values() if recipe.lean.lean]
    assert lean
    assert {recipe.lean.scan for recipe in lean} == {"plain"}
    kernels = climb(replace_fields(START, {"scan": "triton"}), fixed=frozenset({"scan"}))
    assert list(kernels) == TILED, "a person's own scan costs no rung"
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
    assert list(found) == (TILED if tiles else OTHER)
    *others, last = (recipe.optimizer for recipe in found.values())
    assert set(others) == {asked.optimizer}
    assert (last.optimizer, last.optimizer_state_dtype, last.gradient_release) == ("adamw_8bit", "auto", False)
    kept = climb(asked, tiles=tiles, fixed=frozenset({"gradient_release"}))
    without = ["tiles, host, 4-bit embeddings"] if tiles else []
    assert list(kept) == list(found)[:-1] + without


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
    assert list(climb(asked)) == TILED


def test_costs_are_said_of_what_is_made() -> None:
    words = {rung.name: rung.words for rung, _ in ladder(START, tiles=True)}
    assert words["fastest"] == "exact; nothing is computed twice"
    assert words[TILED[-1]] == (
        "the embeddings and the LM head are rounded to 4 bits; the optimizer's state is rounded to 8 bits"
    )
