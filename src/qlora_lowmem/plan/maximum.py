"""How far a recipe reaches on a card: the largest value of one field (length, batch) at which its steps fit."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.plan.recipe_runs import RecipeRun, shortened, submit_recipe, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field
from qlora_lowmem.results.kinds.longest import Longest

Submit = Callable[[Recipe, virtual_gpu.Card], "Future[RecipeRun]"]
Note = Callable[[str, int, bool], None]
Run = TypeVar("Run")


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
    return -1 if run.out_of_memory is not None else card.usable_bytes - run.profile.peak.device


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


def longest(recipe: Recipe, card: virtual_gpu.Card, server: virtual_gpu.Server, *, limit: int, step: int) -> Longest:
    """The longest sequence of `recipe` on `card`, within what a job can count on there; a bar shows what is tried.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    with tqdm(desc=recipe.name, unit="run") as bar:

        def submit(changed: Recipe, card: virtual_gpu.Card) -> "Future[RecipeRun]":
            return submit_recipe(server, changed, card)

        def note(_leaf: str, length: int, fits: bool) -> None:
            bar.update(1)
            bar.set_postfix_str(f"{length:,} tokens {'fit' if fits else 'do not fit'}")

        found = reach(recipe, "max_seq_length", card, submit, limit=limit, step=step, note=note)
    run = found.run or RecipeRun(None)
    peak = run.profile.peak if run.profile is not None else Peak()
    return Longest(
        recipe.name,
        card.name,
        found.value,
        found.next_value,
        "memory" if found.next_value else "limit",
        peak,
        run.floor_bytes,
        run.pinned_host_bytes,
    )


def largest_that_fits(
    probe: Callable[[int], "Future[Run]"],
    room: Callable[[Run], int],
    *,
    start: int,
    limit: int,
    step: int,
    note: Callable[[int, bool], None],
) -> tuple[int, int, Run | None]:
    """The largest multiple of `step` up to `limit` at which `probe` leaves room, taking need to grow with the number.

    Need is nearly a line, so two numbers whose need is known say where it will run out: the multiple below and the one
    above are run next, side by side. Where a line says nothing new, or the last guess did not halve what is open, the
    middle is run.

    Args:
        room: bytes that a run left; negative if it did not fit, and exactly -1 if nobody knows by how much.
        start: the number to begin with.
        note: told each number that was run, and whether it fits.

    Returns:
        (the largest that fits or 0, the smallest seen not to fit or 0, the run at the largest).
    """
    left: dict[int, int] = {}
    good, bad, best = 0, limit // step * step + step, None
    tries = [min(max(start // step, 1) * step, bad - step)] if bad > step else []
    while tries:
        runs = {number: probe(number) for number in tries}
        before = bad - good
        for number in tries:
            run = runs[number].result()
            left[number] = room(run)
            note(number, left[number] >= 0)
            if left[number] < 0:
                bad = min(bad, number)
            elif good < number < bad:
                good, best = number, run
        tries = _next_tries(left, good, bad, step, stalled=2 * (bad - good) > before)
    return good, bad if bad in left else 0, best


def _next_tries(left: dict[int, int], good: int, bad: int, step: int, *, stalled: bool) -> list[int]:
    """The multiples strictly between `good` and `bad` to run next, smallest first; none when nothing is open."""
    if bad - good <= step:
        return []
    fitting = sorted(number for number in left if left[number] >= 0 and number <= good)
    if bad in left and (stalled or not fitting):
        guesses = [_middle(good, bad, step)]
    elif len(fitting) == 1 and left.get(bad, -1) == -1:
        guesses = [2 * good, 4 * good]
    else:
        guess = _where_it_runs_out(left, fitting, bad) // step * step
        guesses = [guess, guess + step]
    if bad not in left:  # past the limit, the limit itself
        guesses = [min(guess, bad - step) for guess in guesses]
    tries = sorted({guess for guess in guesses if good < guess < bad})
    return tries or [_middle(good, bad, step)]


def _middle(good: int, bad: int, step: int) -> int:
    return max((good + bad) // 2 // step * step, good + step)


def _where_it_runs_out(left: dict[int, int], fitting: list[int], bad: int) -> int:
    """Where the line through the largest that fits and another number comes to no room.

    The other is the smallest that does not fit, if it is known by how much; else one that fits and is well below, since
    the allocator takes whole segments and two numbers close to each other say little of the slope.
    """
    good = fitting[-1]
    if left.get(bad, -1) != -1:
        other = bad
    else:
        other = max((number for number in fitting[:-1] if 4 * number <= 3 * good), default=fitting[0])
    slope = (left[other] - left[good]) / (good - other) if other != good else 0.0
    return good + int(left[good] / slope) if slope > 0 else bad
