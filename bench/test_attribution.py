"""Every byte of a peak has a kind, and the kinds sum to what the card must hold: optimised and baseline."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.memory.kinds import OUTSIDE_ALLOCATED
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, submit_recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.attribution import write_attribution

EXPLAINED = ["baseline", "optimised"]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, on_gpu: bool) -> dict[str, "Future[RecipeRun]"]:
    """Each recipe's run with attribution, on a card of the default kind with room for it."""
    if on_gpu:
        pytest.skip("measured attribution: python -m qlora_lowmem.explain --config RECIPE --device cuda")
    card = roomy(virtual_gpu.get_card(request.config.getoption("vram_card") or DEFAULT_CARD))
    server = request.getfixturevalue("virtual_server")
    return {
        name: submit_recipe(server, load_recipe(RECIPES / f"{name}.yaml"), card, attribute=True) for name in EXPLAINED
    }


@pytest.mark.parametrize("name", EXPLAINED)
def test_kinds_sum_to_the_peak(runs: dict[str, "Future[RecipeRun]"], name: str, results_folder: Path) -> None:
    run = runs[name].result()
    assert run.failure is None, run.failure
    found, profile = run.attribution, run.profile
    assert found is not None
    assert profile is not None
    steady = profile.phases["steady"]
    inside = sum(count for kind, count in found.kinds.items() if kind not in OUTSIDE_ALLOCATED)
    assert inside == steady.allocated
    assert sum(found.kinds.values()) == steady.device
    assert found.unexplained_share < 0.02
    record = provenance_record(found.device, found.provenance)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    write_attribution(results_folder / found.device, recipe, found, run.floor_bytes, record, profile.step_launches)
