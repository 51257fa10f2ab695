"""Seeded changes: what costs memory is caught and attributed by kind; what does not passes with 0 bytes' difference."""

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest

from gate.examples import grown
from gate.seeds import HARMLESS, MODEL, REGRESSIONS
from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.cases import recipe_record
from qlora_lowmem.gate.records import attributed
from qlora_lowmem.gate.verdicts import EXACT, compare
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult
from qlora_lowmem.results.kinds.verdicts import Record

pytestmark = pytest.mark.slow

SMALL = {"max_seq_length": "256", "gradient_accumulation_steps": "2"}
BASES = {"checkpointed": {}, "kept": {"gradient_checkpointing": "false", "loss": "full"}}
CARD = virtual_gpu.get_card("rtx-4050-laptop-6gb")


class Runs:
    """Every seed's run, started at once, read when asked for."""

    def __init__(self, server: virtual_gpu.Server, recipes: dict[str, Recipe]) -> None:
        self._server, self._recipes = server, recipes
        self._jobs: dict[tuple[str, str], Future[virtual_gpu.JobResult]] = {}

    def start(self, base: str, seed: str) -> None:
        content = self._recipes[base].to_dict()
        self._jobs[base, seed] = self._server.submit("gate.seeds:run", {"content": content, "seed": seed}, CARD)

    def record(self, base: str, seed: str) -> Record:
        job = self._jobs[base, seed].result()
        assert job.value is not None, job.output_tail
        run = msgspec.convert(job.value, RecipeRun)
        assert run.failure is None, run.failure
        result = CaseResult(self._recipes[base], CARD.name, "virtual", fits=True, profile=run.profile)
        assert run.attribution is not None
        return attributed(recipe_record(result), run.attribution)


@pytest.fixture(scope="module")
def runs(
    recipe_runs: virtual_gpu.Server, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Runs:
    """Only the seeds of the tests that run are started."""
    folder = tmp_path_factory.mktemp("small-hybrid")
    (folder / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | MODEL))
    recipes = {
        base: load_recipe(RECIPES / "optimised.yaml", SMALL | {"model": str(folder)} | change)
        for base, change in BASES.items()
    }
    runs = Runs(recipe_runs, recipes)
    wanted = {item.callspec.params["seed"] for item in request.session.items if "seed" in _parameters(item)}
    for base in BASES:
        runs.start(base, "")
    for seed in wanted:
        runs.start(REGRESSIONS[seed].base if seed in REGRESSIONS else "checkpointed", seed)
    return runs


def _parameters(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


def test_there_are_enough() -> None:
    assert len(REGRESSIONS) >= 12
    assert len(HARMLESS) >= 12


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_regression_is_caught_and_attributed(runs: Runs, seed: str) -> None:
    change = REGRESSIONS[seed]
    baseline, measured = runs.record(change.base, ""), runs.record(change.base, seed)
    verdict = compare(seed, baseline, measured, EXACT)
    assert verdict.name == "REGRESSED", verdict.render()
    kinds = grown(baseline, measured)
    assert next(iter(kinds)) in change.kinds, verdict.render()
    assert measured.allocated - baseline.allocated == sum(kinds.values()), "the kinds' growth is the peak's"


# In launches more of a step: the decay is a kernel over all weights, and a loss that is read is copied, twice.
LAUNCHES = {"weight decay": 1, "the loss read each step": 2}


@pytest.mark.parametrize("seed", HARMLESS)
def test_harmless_change_costs_no_byte(runs: Runs, seed: str) -> None:
    baseline, measured = runs.record("checkpointed", ""), runs.record("checkpointed", seed)
    assert baseline.launches is not None
    allowed = dataclasses.replace(baseline, launches=baseline.launches + LAUNCHES.get(seed, 0))
    verdict = compare(seed, allowed, measured, EXACT)
    assert verdict.name == "PASS", verdict.render()
    assert measured.allocated == baseline.allocated
    assert measured.reserved == baseline.reserved


@pytest.mark.parametrize("package", ["accelerate", "triton", "python", "qlora_lowmem"])
def test_version_without_effect(runs: Runs, package: str) -> None:
    """Versions outside of the key may change; the gate then still compares to the byte."""
    baseline = runs.record("checkpointed", "")
    changed = dataclasses.replace(baseline, versions={**baseline.versions, package: "999"})
    assert compare(package, baseline, changed, EXACT).name == "PASS"


def test_the_snapshot_of_a_job_is_the_same_whatever_ran_before(runs: Runs, tmp_path: Path) -> None:
    del tmp_path
    assert runs.record("checkpointed", "nothing") == runs.record("checkpointed", "")
