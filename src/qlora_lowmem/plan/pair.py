"""A pair planned: a recipe on a card, or the best recipe for a model on a card; and many pairs side by side."""

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, get_args

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.plan.advice import Knob, candidate_changes, knobs_of
from qlora_lowmem.plan.answers import Limit, LimitedBy, Plan, Proposal, Tried, limit_of, need_of
from qlora_lowmem.plan.asked import Pair, PlannedModel, planned_model
from qlora_lowmem.plan.kept_runs import Question, Runs, Tally
from qlora_lowmem.plan.ladder import Rung, ladder, rungs
from qlora_lowmem.plan.maximum import Maximum, maximum_that_fits, room_left
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, shortened, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field, replace_fields
from qlora_lowmem.recipe.moves import Change, CostKind

BATCH_LIMIT = 256


class Planner:
    """Plans one pair. `note` is told what is being looked for, `say` the answer as far as it is known."""

    def __init__(
        self,
        pair: Pair,
        runs: Runs,
        note: Callable[[str], None] = lambda _what: None,
        say: Callable[[Plan], None] = lambda _answer: None,
    ) -> None:
        self._pair = pair
        self._recipe = recipe = pair.model.recipe
        self._card = card = pair.card
        self._roomy = roomy(card)
        self._fullest: Question = "attributed run" if pair.full else "run"
        wanted, context = recipe.batch.max_seq_length, pair.model.context_length
        self._last: LimitedBy = "model" if context is not None and context <= pair.limit else "limit"
        self._limit = max(min(context or pair.limit, pair.limit), wanted)
        self._runs = runs
        self._tally = Tally()
        self._note = note
        self._tell = say
        name = pair.model.asked.base.model
        self.nothing = Plan(pair.subject, name, card.name, card.usable_bytes, pair.recipe_given, wanted)
        self._answer = self.nothing

    def plan(self) -> Plan:
        """The answer.

        Raises:
            QloraLowmemError: a run fails for another reason than memory.
            virtual_gpu.VirtualGPUError: this machine cannot run one.
        """
        started = time.perf_counter()
        if self._pair.recipe_given:
            self._of_the_recipe()
        if not self._answer.fits:
            self._climb()
        found, fits = self._answer.proposal, self._answer.fits
        if not self._pair.recipe_given:
            fits = found is not None and found.reaches_wanted
        seconds = time.perf_counter() - started
        return replace(self._answer, fits=fits, runs=self._tally.asked, cached=self._tally.cached, seconds=seconds)

    def _say(self, **known: Any) -> None:
        self._answer = replace(self._answer, **known)
        self._tell(self._answer)

    def _of_the_recipe(self) -> None:
        recipe, card, full = self._recipe, self._card, self._pair.full
        self._note("the recipe as it is")
        changes = candidate_changes(shortened(recipe), tiles=self._pair.model.tiles) if full else []
        alone = self._submit(two_steps(recipe), card, self._fullest)
        changed = [
            self._submit(change.recipe, self._roomy, "counted run" if change.move.recomputes else "run")
            for change in changes
        ]
        run = alone.result()
        fits = room_left(run, card, recipe.name) >= 0
        self._say(fits=fits, need=need_of(run, fits=True) if fits else None)
        with_room = run if run.out_of_memory is None else self._with_room(two_steps(recipe))
        kinds = with_room.attribution.kinds if with_room.attribution else {}
        self._say(need=need_of(with_room, fits=fits), kinds=kinds)
        longest, _ = self._longest(recipe, with_room)
        self._say(longest=longest)
        if full:
            samples = recipe.batch.batch_size
            # As many tokens take as much memory, nearly.
            near = longest.value * samples // recipe.batch.max_seq_length or None
            known = self._known(with_room, samples)
            batch = self._maximum(recipe, "batch_size", BATCH_LIMIT, 1, known, near)
            self._say(batch=limit_of(batch, 1, "limit"))
            # Where the card refused nothing, one with more memory is asked for the same.
            base_card = card if fits and not run.refused else self._roomy
            # What was attributed need not be run again to be counted.
            question: Question = "run" if shortened(recipe) == two_steps(recipe) else "counted run"
            base = self._submit(shortened(recipe), base_card, question)
            self._say(knobs=self._knobs(changes, base, changed))

    def _climb(self) -> None:
        """Try the rungs up to the first that fits at the wanted length, and propose the last that was tried."""
        pair = self._pair
        rungs = ladder(self._recipe, tiles=pair.model.tiles, fixed=pair.fixed, climbing=pair.recipe_given)
        leanest: tuple[Rung, Recipe, RecipeRun] | None = None
        for rung, recipe in rungs:
            self._note(f"rung: {rung.name}")
            run = self._submit(two_steps(recipe), self._card, "probe").result()
            fits = room_left(run, self._card, recipe.name) >= 0
            self._say(tried=(*self._answer.tried, Tried(rung.name, rung.words, fits)))
            leanest = rung, recipe, run
            if fits:
                break
        if leanest is not None:
            self._answer = replace(self._answer, proposal=self._proposed(*leanest))

    def _proposed(self, rung: Rung, recipe: Recipe, run: RecipeRun) -> Proposal | None:
        """`recipe` with what it reaches, `run` being the one at the wanted length; None where nothing of it fits.

        A person's own recipe keeps its length where that fits. Otherwise the longest is proposed.
        """
        longest, longest_run = self._longest(recipe, run)
        if longest_run is None:
            return None
        reaches = longest.value >= recipe.batch.max_seq_length
        if not (self._pair.recipe_given and reaches):
            recipe, run = replace_field(recipe, "max_seq_length", longest.value), longest_run
        proposed = self._pair.model.as_asked(recipe, self._card.name)
        proposal = Proposal(rung.name, rung.words, proposed, need_of(run, fits=True), longest, reaches)
        if not self._pair.full:
            return proposal
        self._note("the breakdown")
        attributed = self._submit(two_steps(recipe), self._card, "attributed run").result().attribution
        kinds = attributed.kinds if attributed else {}
        fastest = replace_fields(recipe, rungs(tiles=self._pair.model.tiles)[0].fields)
        return replace(proposal, kinds=kinds, flops_ratio=self._flops_ratio(recipe, fastest))

    def _longest(self, recipe: Recipe, run: RecipeRun) -> tuple[Limit, RecipeRun | None]:
        """The longest sequence; the wanted one where no multiple of the step is as long. `run` has the wanted one's
        need, of a card with room for it where this one has none.
        """
        wanted, step = recipe.batch.max_seq_length, min(self._pair.step, self._limit)
        here = self._submit(two_steps(recipe), self._card, "probe").result()
        fits = room_left(here, self._card, recipe.name) >= 0
        found = Maximum(wanted, 0, here)
        if not fits or wanted < self._limit:
            found = self._maximum(recipe, "max_seq_length", self._limit, step, self._known(run, wanted))
        if fits and found.value < wanted and (found.next_value == 0 or wanted < found.next_value):
            found = Maximum(wanted, found.next_value, here)
        return limit_of(found, self._pair.step, self._last), found.run

    def _known(self, run: RecipeRun, number: int) -> dict[int, int]:
        """The room that a whole run left at a number, and the most that there can be: at none lies the floor."""
        if run.profile is None or not run.floor_bytes:
            return {}
        usable = self._card.usable_bytes
        floor = run.floor_bytes + run.profile.outside_allocator_bytes
        return {0: usable - floor, number: usable - run.profile.peak.device}

    def _maximum(
        self, recipe: Recipe, leaf: str, limit: int, step: int, known: Mapping[int, int], near: int | None = None
    ) -> Maximum[RecipeRun]:
        def note(value: int, fits: bool) -> None:
            self._note(f"{leaf} {value:,} {'fits' if fits else 'does not fit'}")

        submit = functools.partial(self._submit, question="probe")
        return maximum_that_fits(
            two_steps(recipe), leaf, self._card, submit, limit=limit, step=step, note=note, known=known, near=near
        )

    def _knobs(
        self, changes: Sequence[Change], base: "Future[RecipeRun]", changed: "Sequence[Future[RecipeRun]]"
    ) -> tuple[Knob, ...]:
        self._note("single changes")
        by_flags = {" ".join(change.flags): change for change in changes}
        plain = base.result()
        if plain.profile is None:
            raise QloraLowmemError(f"{self._recipe.name} fails with room for everything too: {plain.failure}")
        counted = []
        for knob in knobs_of(plain, changes, [future.result() for future in changed], self._card):
            change = by_flags[knob.change]
            ratio = self._flops_ratio(change.recipe, self._recipe) if change.move.recomputes else None
            counted.append(replace(knob, flops_ratio=ratio))
        return ranked(counted)

    def _flops_ratio(self, recipe: Recipe, base: Recipe) -> float:
        """FLOPs of a step of `recipe` over those of `base`."""
        self._note("counting FLOPs")
        both = [self._runs.count_flops(each, self._roomy, self._tally) for each in (recipe, base)]
        return both[0].result() / both[1].result()

    def _with_room(self, recipe: Recipe) -> RecipeRun:
        run = self._submit(recipe, self._roomy, self._fullest).result()
        room_left(run, self._roomy, recipe.name)  # raises if it failed there too
        return run

    def _submit(self, recipe: Recipe, card: virtual_gpu.Card, question: Question = "run") -> "Future[RecipeRun]":
        return self._runs.submit(recipe, card, self._tally, question)


def ranked(knobs: Collection[Knob]) -> tuple[Knob, ...]:
    """By cost first: what costs nothing, what is exact but slower, what changes training; in each, the most saved."""
    return tuple(sorted(knobs, key=lambda knob: (get_args(CostKind).index(knob.kind), -knob.saves_bytes)))


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
        except UsageError as error:
            reasons.append(str(error))
            refused = Plan(subject, recipe.base.model, "", 0, given, length, failure=str(error), bad_input=True)
            asked += [replace(refused, card=card.name, usable_bytes=card.usable_bytes) for card in cards]
        else:
            asked += [Pair(model, card, subject, given, limit, step, full, fixed) for card in cards]
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
        return replace(planner.nothing, failure=str(error))
