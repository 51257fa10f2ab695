"""Lean on the models that people fine-tune, beside the optimised recipe with as many adapters."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, shortened, submit_recipe
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.results.kinds.families import Pair, write_families

pytestmark = pytest.mark.lean
MODELS = (
    "granite-4.0-h-1b", "granite-4.0-1b", "llama-3.2-3b", "llama-3.2-1b", "qwen2.5-1.5b", "smollm2-1.7b",
    "mistral-7b-v0.1", "qwen2.5-7b", "llama-3.1-8b",
)  # fmt: skip
LENGTHS = (1024, 4096)


def _submit(server: virtual_gpu.Server, card: virtual_gpu.Card, model: str, name: str, tokens: int) -> Any:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    changes = {"model": model, "target_modules": "all-linear", "max_seq_length": tokens}
    return submit_recipe(server, shortened(replace_fields(recipe, changes)), card)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, on_gpu: bool, results_folder: Path) -> dict[tuple[str, int], Pair]:
    """Every model at every length, on a card of the default kind with room for all."""
    if on_gpu:
        pytest.skip("random weights of 8 B models are virtual; lean.yaml is measured by bench/test_budgets.py --gpu")
    card = roomy(virtual_gpu.get_card(DEFAULT_CARD))
    server = request.getfixturevalue("virtual_server")
    runs: dict[tuple[str, int, str], Future[RecipeRun]] = {
        (model, tokens, name): _submit(server, card, model, name, tokens)
        for model in MODELS
        for tokens in LENGTHS
        for name in ("optimised", "lean")
    }
    found = {key: run.result() for key, run in tqdm(runs.items(), desc="models", unit="run")}
    made = {
        (model, tokens): Pair(
            model,
            tokens,
            _peak(found[model, tokens, "optimised"]),
            _peak(found[model, tokens, "lean"]),
            found[model, tokens, "lean"].floor_bytes,
            found[model, tokens, "optimised"].micro_batch_launches,
            found[model, tokens, "lean"].micro_batch_launches,
        )
        for model in MODELS
        for tokens in LENGTHS
    }
    write_families(results_folder, list(made.values()), provenance_record(DEFAULT_CARD, "virtual"))
    return made


def _peak(run: RecipeRun) -> int:
    """Allocated, in bytes."""
    assert run.failure is None, run.failure
    assert run.profile is not None
    return run.profile.peak.allocated


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_lean_saves_at_least_a_third_of_what_is_above_the_floor(
    rows: dict[tuple[str, int], Pair], model: str, tokens: int
) -> None:
    row = rows[model, tokens]
    assert row.share >= 1 / 3
    assert row.lean_allocated_bytes >= row.floor_bytes
