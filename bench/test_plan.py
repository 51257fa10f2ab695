"""Ten (model, card) pairs planned from an empty cache; each proposal run again in full, and the next larger length; and
no recipe that trains the same needs less than the leanest that the ladder has."""

import itertools
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.plan.answers import Plan
from qlora_lowmem.plan.asked import planned_model
from qlora_lowmem.plan.kept_runs import RunCache, Runs
from qlora_lowmem.plan.ladder import ladder
from qlora_lowmem.plan.maximum import room_left
from qlora_lowmem.plan.pair import Pair
from qlora_lowmem.plan.recipe_runs import RecipeRun, recipe_server, roomy, submit_recipe, two_steps
from qlora_lowmem.plan.screen import Again, write_plans
from qlora_lowmem.plan.sweep import sweep
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.io import recipe_from_dict, replace_field, replace_fields
from qlora_lowmem.recipe.moves import changes_of, keeps_training

pytestmark = pytest.mark.plan

# (model, card, the wanted length in tokens)
ASKED = (
    ("granite-4.0-h-1b", "rtx-3060-laptop-6gb", 2048),
    ("granite-4.0-h-1b", "rtx-4060-8gb", 2048),
    ("granite-4.0-h-1b", "rtx-3060-12gb", 512),
    ("granite-4.0-1b", "rtx-4050-laptop-6gb", 2048),
    ("granite-4.0-h-350m", "rtx-2060-6gb", 2048),
    ("granite-4.0-350m", "rtx-4060-8gb", 4096),
    ("granite-4.0-h-tiny", "rtx-3090-24gb", 2048),
    ("llama-3.2-3b", "rtx-3060-laptop-6gb", 8192),
    ("llama-3.2-3b", "t4-16gb", 2048),
    ("smollm2-135m-instruct", "rtx-3050-6gb", 2048),
)
CORES, MINUTES = 2, 10
# What PyTorch's allocator grows an expandable segment by (`kLargeBuffer` in CUDACachingAllocator).
RESERVED_AT_ONCE = 20 * 2**20
LIMIT, STEP = 32_768, 256


@dataclass(frozen=True)
class Sweep:
    """Ten plans in the order of `ASKED`, and what they took: wall time, and processor time of all processes."""

    plans: tuple[Plan, ...]
    wall_seconds: float
    cpu_seconds: float
    load_before: float


def asked_pairs() -> list[Pair]:
    """What `plan --model MODEL --card CARD` asks, with a length of their own in place of 2,048 tokens."""
    pairs = []
    for model, card, wanted in ASKED:
        start = {"name": model, "model": model, "target_modules": "all-linear", "max_seq_length": wanted}
        planned = planned_model(replace_fields(Recipe(), start))
        pairs.append(Pair(planned, virtual_gpu.get_card(card), model, False, LIMIT, STEP, full=False))
    return pairs


@pytest.fixture(scope="module")
def planned(on_gpu: bool, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep, timed with everything in it: compiling the virtual GPU's libraries, imports, all runs."""
    if on_gpu:
        pytest.skip("plans are made on virtual cards: pytest bench/test_plan.py without --gpu")
    empty = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_LOWMEM_CACHE", str(empty))
        load, before, started = os.getloadavg()[0], _cpu_seconds(), time.perf_counter()
        pairs = asked_pairs()
        with recipe_server(CORES) as server:
            runs = Runs(server, RunCache(empty / "plan"))
            found = dict(sweep(pairs, runs, server, workers=CORES))
        wall = time.perf_counter() - started
    plans = tuple(found[number] for number in range(len(pairs)))
    return Sweep(plans, wall, _cpu_seconds() - before, load)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended, theirs included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.fixture(scope="module")
def again(planned: Sweep, request: pytest.FixtureRequest, results_folder: Path) -> Iterator[list[Again]]:
    """Every proposal, and the next larger length, run from the proposed recipe alone. The table is written if every
    pair is asked about, and not where `-k` has chosen some of them."""
    server = request.getfixturevalue("virtual_server")
    waiting = []
    for plan in planned.plans:
        proposal = plan.to_dict()["proposal"]
        assert proposal is not None, f"{plan.subject} on {plan.card}: {plan.failure or 'nothing fits'}"
        recipe = two_steps(planned_model(recipe_from_dict(proposal["recipe"])).recipe)
        card = virtual_gpu.get_card(plan.card)
        longer = replace_field(recipe, "max_seq_length", proposal["longest"]["next_value"])
        waiting.append([submit_recipe(server, each, card) for each in (recipe, longer)])
    checked = []
    for plan, (proposed, longer_one) in zip(planned.plans, waiting, strict=True):
        runs = [proposed.result(), longer_one.result()]
        checked.append(Again(*(value for run in runs for value in _held(run, plan))))
    yield checked
    asked = {item.callspec.params["number"] for item in request.session.items if "again" in item.fixturenames}
    if len(asked) < len(ASKED) or request.session.shouldfail:
        return
    text = (
        f"{len(planned.plans)} pairs planned in {planned.wall_seconds:.0f} s with {CORES} workers (load "
        f"{planned.load_before:.1f} before), {planned.cpu_seconds:.0f} s of processor time, from an empty cache. Each "
        "proposed recipe was then run again in full at its length, and at the next larger one."
    )
    write_plans(results_folder, planned.plans, checked, text, provenance_record("the cards of the table", "virtual"))


def _held(run: RecipeRun, plan: Plan) -> tuple[int, bool]:
    room = room_left(run, virtual_gpu.get_card(plan.card), plan.subject)
    assert run.profile is not None
    return run.profile.peak.device, room >= 0


def test_ten_pairs_in_the_time_of_ten_minutes_on_two_cores(planned: Sweep) -> None:
    """Processor time, so that what else a machine does changes nothing; the wall time is in the table."""
    assert len({(plan.model, plan.card) for plan in planned.plans}) == 10
    assert planned.cpu_seconds < CORES * MINUTES * 60
    assert sum(plan.cached for plan in planned.plans) == 0


@pytest.mark.parametrize("number", range(len(ASKED)), ids=[f"{model}-{card}" for model, card, _ in ASKED])
def test_the_proposal_fits_and_the_next_step_does_not(planned: Sweep, again: list[Again], number: int) -> None:
    plan, run = planned.plans[number], again[number]
    assert plan.proposal is not None
    assert plan.fits, "at the wanted length"
    assert run.fits
    assert not run.next_fits
    assert run.device_bytes == plan.proposal.need.device_bytes
    assert plan.proposal.longest.next_value == plan.proposal.longest.value + plan.proposal.longest.step


def exact_recipes(recipe: Recipe, *, tiles: bool) -> set[Recipe]:
    """All that moves come to, one upon the other, while what is trained stays the same."""
    found, new = {recipe}, {recipe}
    while new:
        changes = itertools.chain.from_iterable(changes_of(each, tiles=tiles) for each in new)
        new = {change.recipe for change in changes if change.keeps_training} - found
        found |= new
    return found


def is_exact(recipe: Recipe, start: Recipe) -> bool:
    """Whether it trains what `start` does."""
    now, before = field_values(recipe), field_values(start)
    return all(keeps_training(leaf, same_samples=True) for leaf in now if now[leaf] != before[leaf])


@pytest.mark.parametrize("number", range(len(ASKED)), ids=[f"{model}-{card}" for model, card, _ in ASKED])
def test_no_exact_recipe_needs_less_than_the_ladder_has(
    planned: Sweep, virtual_server: virtual_gpu.Server, number: int
) -> None:
    """At the length that the proposal does not reach any more, the leanest exact rung needs no more than any other
    exact recipe: where one fits, a plan has one to propose. Each is run with room for it, a micro-batch a step. What is
    reserved grows by whole blocks, so where as much is allocated, it may be one block more."""
    pair, proposal = asked_pairs()[number], planned.plans[number].proposal
    assert proposal is not None
    start = replace_fields(
        pair.model.recipe, {"max_seq_length": proposal.longest.next_value, "gradient_accumulation_steps": 1}
    )
    tiles = pair.model.tiles
    made = [recipe for _, recipe in ladder(start, tiles=tiles, fixed=(), climbing=False)]
    rungs = [recipe for recipe in made if is_exact(recipe, start)]
    others = exact_recipes(made[0], tiles=tiles) - set(rungs)
    assert len(others) == 3, "offloading, tiles as a recipe has them, and these with checkpoints in host memory"
    card = roomy(pair.card)
    runs = [submit_recipe(virtual_server, two_steps(recipe), card) for recipe in (rungs[-1], *others)]
    profiles = [run.result().profile for run in runs]
    assert None not in profiles
    leanest, *needs = (profile.peak for profile in profiles if profile is not None)
    assert leanest.allocated <= min(need.allocated for need in needs)
    assert leanest.device <= min(need.device for need in needs) + RESERVED_AT_ONCE
