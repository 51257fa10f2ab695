"""One pair planned on runs that are a formula: what is proposed fits, the next step does not, and why is true."""

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import RECIPES
from plan.fakes import BASE, MIB, FakeRuns, need_of_tokens
from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.answers import Plan
from qlora_lowmem.plan.asked import planned_model
from qlora_lowmem.plan.ladder import ladder
from qlora_lowmem.plan.pair import Pair, Planner, ranked
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field, replace_fields

CARD = virtual_gpu.get_card("rtx-3060-laptop-6gb")
MODEL = replace_fields(Recipe(name="granite"), {"target_modules": "all-linear", "max_seq_length": 2048})


def plan(
    recipe: Recipe,
    runs: FakeRuns | None = None,
    *,
    given: bool = True,
    card: virtual_gpu.Card = CARD,
    limit: int = 32_768,
    step: int = 256,
    full: bool = True,
    keeps_length: bool = False,
) -> Plan:
    pair = Pair(planned_model(recipe), card, recipe.name, given, limit, step, full, keeps_length=keeps_length)
    return Planner(pair, runs or FakeRuns()).plan()  # type: ignore[arg-type]


def test_a_recipe_that_fits() -> None:
    recipe = load_recipe(RECIPES / "optimised.yaml")
    runs = FakeRuns()
    found = plan(recipe, runs)
    assert found.fits
    assert found.proposal is None
    assert found.need is not None
    assert found.need.device_bytes == need_of_tokens(recipe)
    assert found.longest is not None
    assert (found.longest.value, found.longest.next_value) == (4096, 4352)
    assert found.batch is not None
    assert (found.batch.value, found.batch.next_value) == (4, 5)
    assert found.runs == len(runs.asked) + 2 * sum(knob.flops_ratio is not None for knob in found.knobs)


def test_knobs_are_runs_and_ranked_by_cost_first() -> None:
    found = plan(load_recipe(RECIPES / "optimised.yaml"))
    assert found.need is not None
    order = ["none", "slower", "changes training"]
    for before, after in pairwise(found.knobs):
        assert order.index(before.kind) <= order.index(after.kind)
        assert before.kind != after.kind or before.saves_bytes >= after.saves_bytes
    lean = next(knob for knob in found.knobs if knob.change == "--lean true")
    assert lean.saves_bytes == (MIB - MIB // 8) * 1024
    assert lean.flops_ratio == 1.0, "both run layers forward twice here"
    assert all(knob.saves_bytes > 0 for knob in found.knobs)
    assert ranked(found.knobs) == found.knobs


def test_a_recipe_that_does_not_fit_gets_one_that_does() -> None:
    recipe = load_recipe(RECIPES / "baseline.yaml")
    found = plan(recipe)
    assert not found.fits
    assert found.need is not None
    assert found.need.device_bytes == need_of_tokens(recipe), "what it would need, on a card with room for it"
    assert found.proposal is not None
    assert found.proposal.rung == "checkpointing"
    assert found.proposal.flops_ratio == 1.5
    assert found.proposal.recipe.batch.max_seq_length == recipe.batch.max_seq_length, "the person's own length"
    assert found.proposal.recipe.lora == recipe.lora
    assert found.proposal.longest.value > recipe.batch.max_seq_length
    assert [(tried.rung, tried.fits) for tried in found.tried] == [("fastest", False), ("checkpointing", True)]


def test_the_fastest_rung_that_reaches_the_wanted_length_is_proposed() -> None:
    def rung(tokens: int) -> str:
        found = plan(replace_field(MODEL, "max_seq_length", tokens), given=False, full=False)
        assert found.fits
        assert found.proposal is not None
        assert found.proposal.reaches_wanted
        return found.proposal.rung

    lengths = (256, 2048, 8192, 16_384, 32_768)
    assert [rung(tokens) for tokens in lengths] == [
        "fastest", "checkpointing", "tiles", "tiles", "tiles, segments",
    ]  # fmt: skip


@given(
    base=st.integers(100, 7000),
    slope=st.integers(1, 4000),
    wanted=st.integers(2, 40_000),
    waiting=st.integers(0, 30_000),
    card=st.sampled_from(virtual_gpu.all_cards()[:8]),
    given_recipe=st.booleans(),
)
def test_a_proposal_fits_in_full_and_the_next_step_does_not(
    base: int, slope: int, wanted: int, waiting: int, card: virtual_gpu.Card, given_recipe: bool
) -> None:
    def need(recipe: Recipe) -> int:
        """KiB a token by the rung; what waits of a whole step may be much."""
        share = 1 + 9 * (not recipe.memory.gradient_checkpointing) - recipe.lean.lean / 2
        tokens, steps = recipe.batch.max_seq_length, recipe.batch.gradient_accumulation_steps
        return int(base * MIB + share * slope * 1024 * tokens + waiting * tokens * max(steps - 2, 0))

    found = plan(
        replace_field(MODEL, "max_seq_length", wanted), FakeRuns(need), given=given_recipe, card=card, full=False
    )
    proposal, longest = found.proposal, found.longest
    if proposal is not None:
        assert need(proposal.recipe) == proposal.need.device_bytes <= card.usable_bytes
        longest = proposal.longest
    recipe = proposal.recipe if proposal is not None else MODEL
    assert longest is not None or not given_recipe
    if longest is not None and longest.next_value:
        further = replace_fields(recipe, {"max_seq_length": longest.next_value})
        assert need(further) > card.usable_bytes
        assert longest.next_value - longest.step <= longest.value or longest.value == wanted
    if longest is not None and longest.value:
        assert need(replace_field(recipe, "max_seq_length", longest.value)) <= card.usable_bytes
        assert longest.next_value or longest.value + longest.step > 32_768, "the limit is 32,768 or what was wanted"
    start = replace_field(MODEL, "max_seq_length", wanted)
    if given_recipe:
        assert found.fits == (need(start) <= card.usable_bytes)
        return
    rungs = ladder(start, tiles=True, fixed=(), climbing=False)
    fitting = [rung.name for rung, made in rungs if need(made) <= card.usable_bytes]
    assert found.fits == bool(fitting)
    assert not fitting or (proposal is not None and proposal.rung == fitting[0])


def test_a_rung_that_fits_only_without_what_waits_is_no_rung_that_fits() -> None:
    wanted = replace_fields(MODEL, {"max_seq_length": 4096})
    short = need_of_tokens(replace_fields(wanted, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}))
    card = dataclasses.replace(CARD, usable_bytes=short)
    found = plan(wanted, given=False, card=card, full=False)
    assert found.fits
    assert [(tried.rung, tried.fits) for tried in found.tried] == [
        ("fastest", False), ("checkpointing", False), ("tiles", True),
    ]  # fmt: skip


def test_where_nothing_reaches_the_wanted_length_the_leanest_goes_as_far_as_it_can() -> None:
    found = plan(MODEL, FakeRuns(lambda recipe: 4000 * MIB + MIB * recipe.batch.max_seq_length), given=False)
    assert not found.fits
    assert found.proposal is not None
    assert not found.proposal.reaches_wanted
    assert found.proposal.rung == "tiles, host, 4-bit embeddings, 8-bit AdamW"
    assert (found.proposal.longest.value, found.proposal.longest.next_value) == (1536, 1792)
    assert found.proposal.recipe.batch.max_seq_length == 1536
    assert [tried.fits for tried in found.tried] == [False] * 7


def test_where_nothing_fits_at_all_there_is_no_proposal() -> None:
    found = plan(MODEL, FakeRuns(lambda _recipe: 7000 * MIB), given=False)
    assert not found.fits
    assert found.proposal is None
    asked = plan(load_recipe(RECIPES / "lean.yaml"), FakeRuns(lambda _recipe: 7000 * MIB))
    assert not asked.fits
    assert asked.longest is not None
    assert asked.longest.value == 0
    assert asked.need is not None
    assert asked.need.device_bytes == 7000 * MIB


def test_every_rung_is_told_with_its_longest_sequence_and_its_cost() -> None:
    runs = FakeRuns()
    found = plan(MODEL, runs, given=False)
    assert found.proposal is not None
    rungs = {rung.name: recipe for rung, recipe in ladder(MODEL, tiles=True)}
    assert [reach.rung for reach in found.reaches] == list(rungs)[:4], "beyond them none goes further than the limit"
    for reach in found.reaches:
        longest = reach.longest
        assert need_of_tokens(replace_field(rungs[reach.rung], "max_seq_length", longest.value)) <= CARD.usable_bytes
        if longest.next_value:
            longer = replace_field(rungs[reach.rung], "max_seq_length", longest.next_value)
            assert need_of_tokens(longer) > CARD.usable_bytes
            assert longest.next_value - longest.value == 256
    assert found.reaches[1].longest == found.proposal.longest
    assert (found.reaches[-1].longest.value, found.reaches[-1].longest.limited_by) == (32_768, "limit")
    assert [reach.flops_ratio for reach in found.reaches] == [1, 1.5, 1.5, 1.5]
    shallow = FakeRuns()
    assert plan(MODEL, shallow, given=False, full=False).reaches == ()
    assert len(runs.asked) < len(shallow.asked) + 20


def test_where_even_the_leanest_is_short_every_rung_is_told() -> None:
    found = plan(MODEL, FakeRuns(lambda recipe: 4000 * MIB + need_of_tokens(recipe)), given=False)
    assert [reach.longest.value for reach in found.reaches] == [0, 0, 512, 1024, 2048, 4096, 5376]


def test_a_length_that_was_asked_for_is_proposed_with_the_longest_beside_it() -> None:
    found = plan(MODEL, given=False, keeps_length=True)
    longest = plan(MODEL, given=False).proposal
    assert found.proposal is not None
    assert longest is not None
    assert found.proposal.recipe.batch.max_seq_length == 2048
    assert found.proposal.need.device_bytes == need_of_tokens(
        replace_fields(MODEL, {"gradient_checkpointing": True, "loss": "fused"})
    )
    assert found.proposal.longest == longest.longest
    assert longest.recipe.batch.max_seq_length == longest.longest.value > 2048


def test_what_nothing_reaches_is_told_with_what_it_would_need() -> None:
    for given_recipe in (False, True):
        found = plan(MODEL, FakeRuns(lambda recipe: 4000 * MIB + MIB * recipe.batch.max_seq_length), given=given_recipe)
        assert found.shortfall is not None
        assert found.shortfall.rung == "tiles, host, 4-bit embeddings, 8-bit AdamW"
        assert found.shortfall.need.device_bytes == (4000 + 2048) * MIB
        assert not found.shortfall.need.fits
    assert plan(MODEL, given=False).shortfall is None


def test_what_is_asked_beside_an_answer_ends_none() -> None:
    broken = FakeRuns(without=("flops", "attributed run"))
    found = plan(MODEL, broken, given=False)
    assert found.fits
    assert found.proposal is not None
    assert found.proposal.flops_ratio is None
    assert [reach.flops_ratio for reach in found.reaches] == [None] * 4
    assert found.unanswered == ("counting FLOPs: counting FLOPs failed: CUDA out of memory.",)
    recipe = plan(load_recipe(RECIPES / "optimised.yaml"), FakeRuns(without=("flops", "counted run")))
    assert recipe.fits
    assert recipe.batch is not None
    assert recipe.knobs == ()
    assert len(recipe.unanswered) == 1
    assert recipe.unanswered[0].startswith("single changes: optimised fails with room for everything too")


def test_with_room_for_everything_there_is_no_cap_of_the_recipes_own() -> None:
    runs = FakeRuns()
    plan(replace_fields(load_recipe(RECIPES / "baseline.yaml"), {"max_memory": "5 GiB"}), runs)
    caps = {
        (card.total_bytes > 2**39, recipe.memory.max_memory)
        for card, recipe in zip(runs.cards, runs.asked, strict=True)
    }
    assert caps == {(True, "100%"), (False, "5 GiB")}


def test_the_leanest_recipe_that_is_too_long_is_proposed_shorter() -> None:
    leanest = {"quantised_embeddings": "4bit", "optimizer": "adamw_8bit", "checkpoints": "host", "batch_size": 1}
    lean = replace_fields(load_recipe(RECIPES / "lean-host.yaml"), leanest | {"max_seq_length": 8192, "scan": "plain"})
    lean = replace_fields(lean, {"loss_tile_bytes": 2**24, "expandable_segments": True})
    found = plan(lean, FakeRuns(lambda recipe: 4000 * MIB + MIB * recipe.batch.max_seq_length))
    assert not found.fits
    assert found.proposal is not None
    assert (found.proposal.rung, found.proposal.longest.value) == ("as it is", 1536)


def test_the_models_own_length_ends_the_search() -> None:
    small = replace_fields(MODEL, {"model": "smollm2-135m-instruct", "max_seq_length": 1024})
    found = plan(small, FakeRuns(lambda _recipe: BASE), given=False, full=False)
    assert found.proposal is not None
    assert (found.proposal.longest.value, found.proposal.longest.limited_by) == (8192, "model")
    short = plan(small, FakeRuns(lambda _recipe: BASE), given=False, full=False, limit=4096)
    assert short.proposal is not None
    assert (short.proposal.longest.value, short.proposal.longest.limited_by) == (4096, "limit")


def test_a_proposal_names_the_model_the_data_and_a_gpu_as_the_person_did() -> None:
    asked = replace_fields(MODEL, {"data": "mine.jsonl", "model": "ibm-granite/granite-4.0-h-1b"})
    found = plan(asked, given=False, full=False)
    assert found.proposal is not None
    recipe = found.proposal.recipe
    assert (recipe.base, recipe.data, recipe.run.device) == (asked.base, asked.data, "cuda")
    assert recipe.run.card == CARD.name
    assert recipe.schedule == asked.schedule, "two steps are how it is tried, not how it trains"


def test_a_long_warm_up_is_no_hindrance() -> None:
    assert plan(replace_fields(MODEL, {"warmup_steps": 100, "max_seq_length": 1024}), full=False).runs > 0


def test_a_run_that_fails_says_whose_it_was() -> None:
    with pytest.raises(QloraLowmemError, match="granite fails on rtx-3060-laptop-6gb: ValueError: no such thing"):
        plan(MODEL, FakeRuns(failure="Traceback ...\nValueError: no such thing\n"), given=False)


def test_an_answer_is_plain_data() -> None:
    found = plan(load_recipe(RECIPES / "baseline.yaml"))
    plain = found.to_dict()
    assert plain["proposal"]["recipe"]["memory"]["gradient_checkpointing"] is True
    assert plain["proposal"]["longest"] == dataclasses.asdict(found.proposal.longest)  # type: ignore[union-attr]
    assert plain["knobs"][0]["change"] == found.knobs[0].change
