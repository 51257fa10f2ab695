"""A pair planned: a recipe on a card, or the best recipe for a model on a card; and many pairs side by side."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import get_args

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.advice import Knob, candidate_changes, knobs_of
from qlora_lowmem.plan.answers import Limit, LimitedBy, Plan, Proposal, Tried, limit_of, need_of
from qlora_lowmem.plan.kept_runs import Runs, Tally
from qlora_lowmem.plan.ladder import Rung, ladder, rungs
from qlora_lowmem.plan.maximum import Reach, reach_in_full, room_left
from qlora_lowmem.plan.model import PlannedModel
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, shortened, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field, replace_fields
from qlora_lowmem.recipe.moves import Change, CostKind

BATCH_LIMIT = 256


@dataclass(frozen=True)
class Pair:
    """What is asked.

    Attributes:
        model: the recipe, ready for planning; its `max_seq_length` is the wanted length.
        subject: how answers name it.
        recipe_given: whether it is the person's own recipe, or where the ladder starts for a model.
        fixed: fields set on the command line, which no proposal changes.
    """

    model: PlannedModel
    card: virtual_gpu.Card
    subject: str
    recipe_given: bool
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Extent:
    """How much is looked into.

    Attributes:
        limit: tokens; no longer sequence is tried.
        step: tokens that lengths are told apart by.
        full: also the breakdown, the largest batch, single changes, FLOPs.
    """

    limit: int
    step: int
    full: bool


class Planner:
    """Plans one pair. `note` is told, in a few words, what is being looked for."""

    def __init__(self, pair: Pair, extent: Extent, runs: Runs, note: Callable[[str], None]) -> None:
        self._pair = pair
        self._recipe = pair.model.recipe
        self._card = pair.card
        self._roomy = roomy(pair.card)
        self._full = extent.full
        self._step = extent.step
        self._limit, self._last = self._where_to_stop(extent.limit)
        self._runs = runs
        self._tally = Tally()
        self._note = note

    def plan(self) -> Plan:
        """The answer.

        Raises:
            QloraLowmemError: a run fails for another reason than memory.
            virtual_gpu.VirtualGPUError: this machine cannot run one.
        """
        started = time.perf_counter()
        answer = self._of_the_recipe() if self._pair.recipe_given else self._of_the_model()
        seconds = time.perf_counter() - started
        return replace(answer, runs=self._tally.asked, cached=self._tally.cached, seconds=seconds)

    def nothing(self, failure: str | None = None) -> Plan:
        """The pair without an answer yet, or with the reason why there is none."""
        recipe = self._recipe
        return Plan(
            self._pair.subject,
            self._pair.model.asked.base.model,
            self._card.name,
            self._card.usable_bytes,
            self._pair.recipe_given,
            recipe.batch.max_seq_length,
            failure=failure,
        )

    def _where_to_stop(self, limit: int) -> tuple[int, LimitedBy]:
        context = self._pair.model.context_length
        if context is not None and context <= limit:
            return max(context, self._recipe.batch.max_seq_length), "model"
        return max(limit, self._recipe.batch.max_seq_length), "limit"

    def _of_the_recipe(self) -> Plan:
        recipe, card = self._recipe, self._card
        self._note("the recipe as it is")
        changes = candidate_changes(shortened(recipe), tiles=self._pair.model.tiles) if self._full else []
        alone = self._submit(two_steps(recipe), card, attribute=self._full)
        waiting = [self._submit(each, self._roomy) for each in self._each_changed(changes)]
        run = alone.result()
        fits = room_left(run, card, recipe.name) >= 0
        with_room = run if run.out_of_memory is None else self._with_room(two_steps(recipe))
        answer = replace(
            self.nothing(),
            fits=fits,
            need=need_of(with_room, fits=fits),
            kinds=with_room.attribution.kinds if with_room.attribution else {},
            longest=self._longest(recipe)[0],
        )
        if self._full:
            batch = self._reach(recipe, "batch_size", BATCH_LIMIT, 1)
            answer = replace(answer, batch=limit_of(batch, 1, "limit"), knobs=self._knobs(changes, waiting))
        if fits:
            return answer
        tried, proposal = self._climb(climbing=True)
        return replace(answer, tried=tried, proposal=proposal)

    def _of_the_model(self) -> Plan:
        tried, proposal = self._climb(climbing=False)
        fits = proposal is not None and proposal.reaches_wanted
        return replace(self.nothing(), fits=fits, tried=tried, proposal=proposal)

    def _climb(self, *, climbing: bool) -> tuple[tuple[Tried, ...], Proposal | None]:
        """The rungs up to the first that fits at the wanted length, and what is proposed."""
        tried: list[Tried] = []
        leanest: tuple[Rung, Recipe] | None = None
        model = self._pair.model
        for rung, recipe in ladder(self._recipe, tiles=model.tiles, fixed=self._pair.fixed, climbing=climbing):
            self._note(f"rung: {rung.name}")
            leanest = (rung, recipe)
            run = self._submit(shortened(recipe), self._card).result()
            if room_left(run, self._card, recipe.name) >= 0:
                longest, longest_run = self._longest(recipe)
                # With all of a step's micro-batches waiting on the card, it may be a little too much after all.
                if longest_run is not None and longest.value >= recipe.batch.max_seq_length:
                    tried.append(Tried(rung.name, rung.words, fits=True))
                    return tuple(tried), self._propose(rung, recipe, longest, longest_run)
            tried.append(Tried(rung.name, rung.words, fits=False))
        if leanest is None:
            return (), None
        longest, longest_run = self._longest(leanest[1])
        return tuple(tried), self._propose(*leanest, longest, longest_run) if longest_run is not None else None

    def _propose(self, rung: Rung, recipe: Recipe, longest: Limit, run: RecipeRun) -> Proposal:
        """`recipe` with what it reaches, `run` being the one there.

        A person's own recipe keeps its length where that fits. Otherwise the longest is proposed.
        """
        reaches = longest.value >= recipe.batch.max_seq_length
        if self._pair.recipe_given and reaches:
            run = self._submit(two_steps(recipe), self._card).result()
        else:
            recipe = replace_field(recipe, "max_seq_length", longest.value)
        proposed = self._pair.model.as_asked(recipe, self._card.name)
        proposal = Proposal(rung.name, rung.words, proposed, need_of(run, fits=True), longest, reaches)
        if not self._full:
            return proposal
        self._note("the breakdown")
        attributed = self._submit(two_steps(recipe), self._card, attribute=True).result().attribution
        kinds = attributed.kinds if attributed else {}
        return replace(proposal, kinds=kinds, flops_ratio=self._flops_ratio(recipe, self._fastest(recipe)))

    def _fastest(self, recipe: Recipe) -> Recipe:
        return replace_fields(recipe, rungs(tiles=self._pair.model.tiles)[0].fields)

    def _longest(self, recipe: Recipe) -> tuple[Limit, RecipeRun | None]:
        """The longest sequence, its steps run in full; the wanted one where no multiple of the step is as long."""
        wanted = recipe.batch.max_seq_length
        found = Reach(0, 0, None)
        if wanted < self._limit:
            found = self._reach(recipe, "max_seq_length", self._limit, min(self._step, self._limit))
        if found.value < wanted and (found.next_value == 0 or wanted < found.next_value):
            run = self._submit(two_steps(recipe), self._card).result()
            if room_left(run, self._card, recipe.name) >= 0:
                found = Reach(wanted, found.next_value, run)
            elif wanted >= self._limit:
                found = self._reach(recipe, "max_seq_length", self._limit, min(self._step, self._limit))
        return limit_of(found, self._step, self._last), found.run

    def _reach(self, recipe: Recipe, leaf: str, limit: int, step: int) -> Reach:
        def note(leaf: str, value: int, fits: bool) -> None:
            self._note(f"{leaf} {value:,} {'fits' if fits else 'does not fit'}")

        return reach_in_full(recipe, leaf, self._card, self._submit, limit=limit, step=step, note=note)

    def _each_changed(self, changes: Sequence[Change]) -> list[Recipe]:
        return [shortened(self._recipe), *(change.recipe for change in changes)] if changes else []

    def _knobs(self, changes: Sequence[Change], waiting: "Sequence[Future[RecipeRun]]") -> tuple[Knob, ...]:
        self._note("single changes")
        base, *runs = [future.result() for future in waiting]
        if base.profile is None:
            raise QloraLowmemError(f"{self._recipe.name} fails with room for everything too: {base.failure}")
        by_flags = {" ".join(change.flags): change for change in changes}
        counted = []
        for knob in knobs_of(base, changes, runs, self._card):
            change = by_flags[knob.change]
            ratio = self._flops_ratio(change.recipe, self._recipe) if change.move.recomputes else None
            counted.append(replace(knob, flops_ratio=ratio))
        return ranked(counted)

    def _flops_ratio(self, recipe: Recipe, base: Recipe) -> float:
        """FLOPs of a step of `recipe` over those of `base`."""
        self._note("counting FLOPs")
        both = [self._runs.count_flops(each, self._roomy, self._tally) for each in (recipe, base)]
        changed, plain = (future.result() for future in both)
        return changed / plain

    def _with_room(self, recipe: Recipe) -> RecipeRun:
        run = self._submit(recipe, self._roomy, attribute=self._full).result()
        room_left(run, self._roomy, recipe.name)  # raises if it failed there too
        return run

    def _submit(self, recipe: Recipe, card: virtual_gpu.Card, attribute: bool = False) -> "Future[RecipeRun]":
        return self._runs.submit(recipe, card, self._tally, attribute)


def ranked(knobs: Collection[Knob]) -> tuple[Knob, ...]:
    """By cost first: what costs nothing, what is exact but slower, what changes training; in each, the most saved."""
    return tuple(sorted(knobs, key=lambda knob: (get_args(CostKind).index(knob.kind), -knob.saves_bytes)))


def sweep(
    pairs: Sequence[Pair], extent: Extent, runs: Runs, server: virtual_gpu.Server, *, workers: int
) -> Iterator[tuple[int, Plan]]:
    """Each pair's number and answer as it is ready. A pair that fails says why, and the others go on.

    Ended early, it closes the server, so that nothing is waited for; the cache has what was made until then.

    Raises:
        virtual_gpu.VirtualGPUUnavailable: this machine cannot host a virtual GPU.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        planned = {pool.submit(_plan, pair, extent, runs): number for number, pair in enumerate(pairs)}
        for done in as_completed(planned):
            yield planned[done], done.result()
    except BaseException:
        server.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _plan(pair: Pair, extent: Extent, runs: Runs) -> Plan:
    planner = Planner(pair, extent, runs, _SILENT)
    try:
        return planner.plan()
    except QloraLowmemError as error:
        return planner.nothing(failure=str(error))


_SILENT: Callable[[str], None] = lambda _what: None  # noqa: E731
