"""Many pairs side by side: every combination of what is asked, and the answer to each as it is ready."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.plan.answers import Plan
from qlora_lowmem.plan.asked import Pair, PlannedModel, planned_model
from qlora_lowmem.plan.kept_runs import Runs
from qlora_lowmem.plan.ladder import ladder
from qlora_lowmem.plan.pair import Planner
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field


def pairs_of(
    recipes: Sequence[Recipe],
    cards: Sequence[virtual_gpu.Card],
    *,
    given: bool,
    several_models: bool,
    wanted: int | None,
    limit: int,
    step: int,
    full: bool,
    fixed: frozenset[str],
) -> list[Pair | Plan]:
    """Every combination: a pair to plan or, where its model cannot be planned, the answer that says why.

    Args:
        given: the recipes are the person's own; a model's alone starts no longer than what the model was made for.
        several_models: they stand in the recipes, and answers name them too.
        wanted: the length that was asked for on the command line.
        limit, step, full, fixed: as in `Pair`.

    Raises:
        UsageError: no pair can be planned.
    """
    asked: list[Pair | Plan] = []
    reasons: list[str] = []
    for recipe in recipes:
        subject = f"{recipe.name}, {recipe.base.model}" if several_models else recipe.name
        length = recipe.batch.max_seq_length
        try:
            model = _planned(recipe, given, wanted)
            if not given:
                ladder(model.recipe, tiles=model.tiles, fixed=fixed)
        except UsageError as error:
            reasons.append(str(error))
            refused = Plan(subject, recipe.base.model, "", 0, given, length, failure=str(error), bad_input=True)
            asked += [replace(refused, card=card.name, usable_bytes=card.usable_bytes) for card in cards]
        else:
            kept = wanted is not None
            asked += [Pair(model, card, subject, given, limit, step, full, fixed, kept) for card in cards]
    if len(reasons) == len(recipes):
        raise UsageError("\n".join(dict.fromkeys(reasons)))
    return asked


def _planned(recipe: Recipe, given: bool, wanted: int | None) -> PlannedModel:
    model, length = planned_model(recipe), recipe.batch.max_seq_length
    context = model.context_length or length
    if context < length and wanted is not None:
        raise UsageError(f"--seq: {recipe.base.model} was made for {context} tokens at most, not {wanted}")
    return planned_model(replace_field(recipe, "max_seq_length", context)) if context < length and not given else model


def sweep(pairs: Sequence[Pair], runs: Runs, server: virtual_gpu.Server, *, workers: int) -> Iterator[tuple[int, Plan]]:
    """Each pair's number and answer as it is ready. A pair that fails says why, and the others go on.

    Ended early, it closes the server, so that nothing is waited for; the cache has what was made until then.

    Raises:
        virtual_gpu.VirtualGPUUnavailable: this machine cannot host a virtual GPU.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        planned = {pool.submit(_plan, pair, runs): number for number, pair in enumerate(pairs)}
        for done in as_completed(planned):
            yield planned[done], done.result()
    except BaseException:
        server.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _plan(pair: Pair, runs: Runs) -> Plan:
    planner = Planner(pair, runs)
    try:
        return planner.plan()
    except QloraLowmemError as error:
        return replace(planner.nothing, failure=str(error), bad_input=isinstance(error, UsageError))
