"""How far a recipe reaches on a card: the largest value of one field (length, batch) at which its steps fit."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.recipe_runs import RecipeRun, shortened, two_steps
from qlora_lowmem.plan.search import largest_that_fits
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field

Submit = Callable[[Recipe, virtual_gpu.Card], "Future[RecipeRun]"]
Note = Callable[[str, int, bool], None]


@dataclass(frozen=True)
class Reach:
    """What was found.

    Attributes:
        value: the largest that fits; 0 where not even the smallest does.
        next_value: the smallest that was run and does not fit; 0 where the limit fits.
        run: the run at `value`; None where that is 0.
    """

    value: int
    next_value: int
    run: RecipeRun | None


def room_left(run: RecipeRun, card: virtual_gpu.Card, name: str) -> int:
    """Bytes that `run` left of what a job can count on; negative if it did not fit.

    Raises:
        QloraLowmemError: the run failed for another reason than memory; `name` says whose it was.
    """
    if run.profile is None:
        raise QloraLowmemError(f"{name} fails on {card.name}: {(run.failure or 'no output').strip().splitlines()[-1]}")
    return -1 if run.out_of_memory is not None else card.usable_bytes - run.profile.peak_device_bytes


def reach(
    recipe: Recipe, leaf: str, card: virtual_gpu.Card, submit: Submit, *, limit: int, step: int, note: Note
) -> Reach:
    """The largest multiple of `step` up to `limit` of the field `leaf`, each tried with two short optimizer steps.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    short = shortened(recipe)
    start = int(getattr(recipe.batch, leaf))

    def probe(number: int) -> "Future[RecipeRun]":
        return submit(replace_field(short, leaf, number), card)

    def room(run: RecipeRun) -> int:
        return room_left(run, card, recipe.name)

    found = largest_that_fits(
        probe,
        room,
        start=start,
        limit=limit,
        step=step,
        note=lambda number, fits: note(leaf, number, fits),
    )
    return Reach(*found)


def reach_in_full(
    recipe: Recipe, leaf: str, card: virtual_gpu.Card, submit: Submit, *, limit: int, step: int, note: Note
) -> Reach:
    """The same, held against the recipe's whole optimizer steps: what waits of a step's micro-batches counts too.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    found = reach(recipe, leaf, card, submit, limit=limit, step=step, note=note)
    value, next_value = found.value, found.next_value
    while value:
        run = submit(replace_field(two_steps(recipe), leaf, value), card).result()
        fits = room_left(run, card, recipe.name) >= 0
        note(leaf, value, fits)
        if fits:
            return Reach(value, next_value, run)
        value, next_value = value - step, value
    return Reach(0, next_value, None)
