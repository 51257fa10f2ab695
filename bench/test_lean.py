"""From the baseline to lean, one idea a step; and what the lean recipes may cost."""

from collections.abc import Iterator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.results.kinds.waterfall import Step, write_waterfall
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.units import GIB, format_bytes

# (idea, the fields that change); each starts where the one before ended.
IDEAS: list[tuple[str, dict[str, str]]] = [
    ("baseline: r 16, seq 2048, full logits", {}),
    ("gradient checkpointing", {"gradient_checkpointing": "true"}),
    ("fused LM head and loss", {"loss": "fused"}),
    ("seq 1024", {"max_seq_length": "1024"}),
    ("r 8 (optimised)", {"lora_r": "8", "lora_alpha": "16"}),
    ("adapters on all linear layers", {"target_modules": "all-linear"}),
    ("lean: layers in tiles, all inputs kept", {"lean": "true", "checkpoints": "layer"}),
    ("segments: about sqrt of the inputs kept", {"checkpoints": "segments"}),
    ("logits in tiles of 16 MiB (lean)", {"loss_tile_bytes": "16777216"}),
    ("embeddings in 8 bits", {"quantised_embeddings": "8bit"}),
    ("embeddings in 4 bits", {"quantised_embeddings": "4bit"}),
    ("AdamW in 8 bits", {"optimizer": "adamw_8bit"}),
]
pytestmark = pytest.mark.lean
COSTS_MORE = "adapters on all linear layers"


def ladder() -> list[tuple[str, Recipe]]:
    """Every step's recipe."""
    # Two micro-batches: as much as eight, but for the batches that wait (24 bytes a token each).
    recipe = replace_field(load_recipe(RECIPES / "baseline.yaml"), "gradient_accumulation_steps", 2)
    steps = []
    for idea, change in IDEAS:
        for leaf, value in sorted(change.items(), key=lambda item: item[0] == "lean"):
            recipe = replace_field(recipe, leaf, value)
        steps.append((idea, recipe))
    return steps


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, on_gpu: bool, results_folder: Path
) -> Iterator[dict[str, "Future[RecipeRun]"]]:
    """Each step's run, on a card of the default kind with room for the baseline."""
    if on_gpu:
        pytest.skip("the ladder is virtual; lean.yaml is measured by pytest bench/test_budgets.py --gpu")
    card = virtual_gpu.get_card(request.config.getoption("vram_card") or DEFAULT_CARD)
    server = request.getfixturevalue("virtual_server")
    running = {idea: submit_recipe(server, recipe, roomy(card)) for idea, recipe in ladder()}
    yield running
    steps, recipes = [], dict(ladder())
    for idea, future in running.items():
        run = future.result()
        if run.profile is None:
            return
        peaks = run.profile
        tokens = recipes[idea].batch.max_seq_length
        steps.append(
            Step(idea, peaks.peak.allocated, peaks.peak.device, run.floor_bytes, tokens, run.micro_batch_launches)
        )
    model = model_names(recipe.base.model for recipe in recipes.values())
    write_waterfall(results_folder / card.name, model, steps, provenance_record(card.name, "virtual"))


def peak(runs: dict[str, "Future[RecipeRun]"], idea: str) -> int:
    run = runs[idea].result()
    assert run.failure is None, run.failure
    assert run.profile is not None
    return run.profile.peak.allocated


def test_the_ladder_ends_at_the_shipped_recipe() -> None:
    steps = dict(ladder())
    shipped = replace_field(load_recipe(RECIPES / "lean.yaml"), "name", "baseline")
    shipped = replace_field(shipped, "gradient_accumulation_steps", 2)
    assert replace_field(steps["logits in tiles of 16 MiB (lean)"], "output_dir", shipped.run.output_dir) == shipped


@pytest.mark.parametrize(("before", "after"), [(a[0], b[0]) for a, b in pairwise(IDEAS)], ids=[i[0] for i in IDEAS[1:]])
def test_each_idea_saves(runs: dict[str, "Future[RecipeRun]"], before: str, after: str) -> None:
    if after == COSTS_MORE:
        assert peak(runs, after) > peak(runs, before)
    else:
        assert peak(runs, after) < peak(runs, before)


@pytest.mark.parametrize(
    ("idea", "limit"),
    [("logits in tiles of 16 MiB (lean)", 1.12), ("embeddings in 4 bits", 0.92)],
)
def test_budget_in_gib(runs: dict[str, "Future[RecipeRun]"], idea: str, limit: float) -> None:
    allowed, found = int(limit * GIB), peak(runs, idea)
    assert found <= allowed, f"{idea}: {format_bytes(found)} is {format_bytes(found - allowed)} over {limit} GiB"
