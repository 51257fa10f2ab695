"""A pair planned: a recipe on a card, or the best recipe for a model on a card."""

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar, get_args

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.advice import Knob, candidate_changes, knobs_of
from qlora_lowmem.plan.answers import Limit, LimitedBy, Plan, Proposal, Reach, Shortfall, Tried, limit_of, need_of
from qlora_lowmem.plan.asked import Pair
from qlora_lowmem.plan.kept_runs import Question, Runs, Tally
from qlora_lowmem.plan.ladder import AS_IT_IS, Rung, computing_nothing_twice, ladder
from qlora_lowmem.plan.maximum import Maximum, maximum_that_fits, room_left
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, shortened, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field, replace_fields
from qlora_lowmem.recipe.moves import Change, CostKind

BATCH_LIMIT = 256

Answer = TypeVar("Answer")


class Planner:
    """Plans one pair.

    Args:
        note: told what is being looked for.
        say: told the answer as far as it is known.
        found: told the answer once it is known whether something fits and what, before all else that is asked.
    """

    def __init__(
        self,
        pair: Pair,
        runs: Runs,
        note: Callable[[str], None] = lambda _what: None,
        say: Callable[[Plan], None] = lambda _answer: None,
        found: Callable[[Plan], None] = lambda _answer: None,
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
        self._found = found
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
        seconds = time.perf_counter() - started
        return replace(self._answer, runs=self._tally.asked, cached=self._tally.cached, seconds=seconds)

    def _say(self, **known: Any) -> None:
        self._answer = replace(self._answer, **known)
        self._tell(self._answer)

    def _aside(self, what: str, ask: Callable[[], Answer]) -> Answer | None:
        """What a question beside the answer comes to: one that fails ends no answer, and is told below it."""
        self._note(what)
        try:
            return ask()
        except QloraLowmemError as error:
            self._say(unanswered=tuple(dict.fromkeys((*self._answer.unanswered, f"{what}: {error}"))))
            return None

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
        with_room = run
        if run.out_of_memory is not None:
            with_room = self._aside("what it needs", lambda: self._with_room(two_steps(recipe))) or run
        kinds = with_room.attribution.kinds if with_room.attribution else {}
        self._say(need=need_of(with_room, fits=fits) if with_room.out_of_memory is None else None, kinds=kinds)
        longest, _ = self._longest(recipe, with_room)
        self._say(longest=longest)
        if fits:
            self._found(self._answer)
        if full:
            samples = recipe.batch.batch_size
            # As many tokens take as much memory, nearly.
            near = longest.value * samples // recipe.batch.max_seq_length or None
            known = self._known(with_room, samples)
            batch = self._aside(
                "the largest batch",
                lambda: limit_of(self._maximum(recipe, "batch_size", BATCH_LIMIT, 1, known, near), 1, "limit"),
            )
            self._say(batch=batch)
            # Where the card refused nothing, one with more memory is asked for the same.
            base_card = card if fits and not run.refused else self._roomy
            # What was attributed need not be run again to be counted.
            question: Question = "run" if shortened(recipe) == two_steps(recipe) else "counted run"
            base = self._submit(shortened(recipe), base_card, question)
            self._say(knobs=self._aside("single changes", lambda: self._knobs(changes, base, changed)) or ())

    def _climb(self) -> None:
        """Try the rungs up to the first that fits at the wanted length, and propose the last that was tried."""
        pair, wanted = self._pair, self._recipe.batch.max_seq_length
        rungs = ladder(self._recipe, tiles=pair.model.tiles, fixed=pair.fixed, climbing=pair.recipe_given)
        for rung, recipe in rungs or [(AS_IT_IS, self._recipe)]:  # the leanest is climbed no further
            self._note(f"rung: {rung.name}")
            run = self._submit(two_steps(recipe), self._card, "probe").result()
            fits = room_left(run, self._card, recipe.name) >= 0
            launches = run.step_launches if fits else None
            self._say(tried=(*self._answer.tried, Tried(rung.name, rung.words, fits, launches)))
            if fits:
                break
        proposal, longest_run = self._proposed(rung, recipe, run)
        reaches = proposal is not None and proposal.reaches_wanted
        self._say(proposal=proposal, fits=reaches and not pair.recipe_given)
        if not fits and (pair.full or proposal is None):
            self._say(shortfall=self._aside(f"what {wanted:,} tokens need", lambda: self._lacking(rung, recipe)))
        self._found(self._answer)
        if not pair.full:
            return
        if proposal is not None:
            made = replace_field(recipe, "max_seq_length", proposal.recipe.batch.max_seq_length)
            self._detail(proposal, made)
        if not pair.recipe_given:
            self._compare(rungs, proposal, longest_run)

    def _proposed(self, rung: Rung, recipe: Recipe, run: RecipeRun) -> tuple[Proposal | None, RecipeRun | None]:
        """`recipe` with what it reaches, `run` being the one at the wanted length, and the run at the longest; None
        where nothing of it fits.

        A person's own recipe keeps its length where that fits, as does a length that was asked for. Otherwise the
        longest is proposed.
        """
        longest, longest_run = self._longest(recipe, run)
        if longest_run is None:
            return None, None
        reaches = longest.value >= recipe.batch.max_seq_length
        if not (reaches and (self._pair.recipe_given or self._pair.keeps_length)):
            recipe, run = replace_field(recipe, "max_seq_length", longest.value), longest_run
        proposed = self._pair.model.as_asked(recipe, self._card.name)
        need = need_of(run, fits=True)
        return Proposal(rung.name, rung.words, proposed, need, longest, reaches), longest_run

    def _detail(self, proposal: Proposal, recipe: Recipe) -> None:
        """Where the bytes of the proposed `recipe` go, and its FLOPs and launches."""
        run = self._aside(
            "the breakdown", lambda: self._submit(two_steps(recipe), self._card, "attributed run").result()
        )
        if run is not None and run.attribution is not None:
            proposal = replace(proposal, kinds=run.attribution.kinds)
            self._say(proposal=proposal)
        plain = computing_nothing_twice(recipe)
        proposal = replace(proposal, flops_ratio=self._flops_ratio(recipe, plain))
        if run is not None and run.step_launches is not None and plain != recipe:
            base = self._aside("counting launches", lambda: self._submit(two_steps(plain), self._roomy).result())
            proposal = replace(proposal, launches_ratio=run.launches_over(base) if base is not None else None)
        self._say(proposal=proposal)

    def _lacking(self, rung: Rung, recipe: Recipe) -> Shortfall:
        run = self._with_room(two_steps(recipe))
        kinds = run.attribution.kinds if run.attribution else {}
        return Shortfall(rung.name, need_of(run, fits=False), kinds)

    def _compare(
        self, rungs: Sequence[tuple[Rung, Recipe]], proposal: Proposal | None, longest_run: RecipeRun | None
    ) -> None:
        """How far each rung goes and what it costs, up to one that goes as far as lengths are looked at."""
        pair, wanted = self._pair, self._recipe.batch.max_seq_length
        known = self._known(longest_run, 0) if longest_run is not None else {}
        tried = {each.rung: each.fits for each in self._answer.tried}
        length = pair.step
        for rung, recipe in rungs:
            found: tuple[Limit, RecipeRun | None] | None
            if proposal is not None and rung.name == proposal.rung:
                found = proposal.longest, longest_run
            else:  # a leaner one goes further, and what was tried and does not fit is no further looked at
                end = wanted - 1 if rung.name in tried else self._limit
                found = self._aside(
                    f"how far {rung.name} goes", functools.partial(self._furthest, recipe, length, end, known)
                )
            if found is None:
                continue
            longest, run = found
            length = max(length, longest.value)
            # Rounded embeddings and optimizer states multiply as much.
            exact = replace_fields(recipe, {"max_seq_length": length, "quantised_embeddings": "none"})
            ratio = self._flops_ratio(exact, computing_nothing_twice(exact))
            host, launches = (run.pinned_host_bytes, run.step_launches) if run is not None else (0, None)
            self._say(reaches=(*self._answer.reaches, Reach(rung.name, rung.words, longest, ratio, host, launches)))
            if longest.limited_by != "memory":
                break

    def _furthest(
        self, recipe: Recipe, start: int, end: int, known: Mapping[int, int]
    ) -> tuple[Limit, RecipeRun | None]:
        step, first = self._pair.step, replace_field(recipe, "max_seq_length", max(start, 2))
        found = self._maximum(first, "max_seq_length", end, min(step, end), known)
        if end < self._limit and not found.next_value:
            found = found._replace(next_value=end + 1)
        return limit_of(found, step, self._last), found.run

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
        """The room that a whole run left at a number, and the most that there can be: at 0 lies the floor."""
        if run.profile is None or not run.floor_bytes:
            return {}
        usable = self._card.usable_bytes
        floor = run.floor_bytes + run.profile.outside_allocator_bytes
        return {number: usable - run.profile.peak.device, 0: usable - floor}

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
            raise plain.fault(f"{self._recipe.name} fails with room for everything too")
        counted = []
        for knob in knobs_of(plain, changes, [future.result() for future in changed], self._card):
            change = by_flags[knob.change]
            ratio = self._flops_ratio(change.recipe, self._recipe) if change.move.recomputes else None
            counted.append(replace(knob, flops_ratio=ratio))
        return ranked(counted)

    def _flops_ratio(self, recipe: Recipe, base: Recipe) -> float | None:
        """FLOPs of a step of `recipe` over those of `base`; None where they cannot be counted."""
        both = [self._runs.count_flops(each, self._roomy, self._tally) for each in (recipe, base)]
        return self._aside("counting FLOPs", lambda: both[0].result() / both[1].result())

    def _with_room(self, recipe: Recipe) -> RecipeRun:
        run = self._submit(recipe, self._roomy, self._fullest).result()
        room_left(run, self._roomy, recipe.name)  # raises if it failed there too
        return run

    def _submit(self, recipe: Recipe, card: virtual_gpu.Card, question: Question = "run") -> "Future[RecipeRun]":
        if card is self._roomy:  # a recipe's own cap would leave no room there
            recipe = replace_field(recipe, "max_memory", "100%")
        return self._runs.submit(recipe, card, self._tally, question)


def ranked(knobs: Collection[Knob]) -> tuple[Knob, ...]:
    """By cost first: what costs nothing, what is exact but slower, what changes training; in each, the most saved."""
    return tuple(sorted(knobs, key=lambda knob: (get_args(CostKind).index(knob.kind), -knob.saves_bytes)))
