"""The maximum that fits: the largest value of one field of a recipe (length, batch) at which its steps fit a card."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.plan.recipe_runs import RecipeRun, shortened, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field
from qlora_lowmem.results.kinds.longest import Longest

Submit = Callable[[Recipe, virtual_gpu.Card], "Future[RecipeRun]"]
Note = Callable[[int, bool], None]
Run = TypeVar("Run")


class Maximum(NamedTuple, Generic[Run]):
    """The largest that fits or 0, the smallest that was run and does not fit or 0, and the run at `value`."""

    value: int
    next_value: int
    run: Run | None


def room_left(run: RecipeRun, card: virtual_gpu.Card, name: str) -> int:
    """Bytes that `run` left of what a job can count on; negative if it did not fit, -1 if nobody knows by how much.

    Raises:
        QloraLowmemError: the run failed for another reason than memory (a UsageError where its recipe was refused);
            `name` says whose it was.
    """
    if run.profile is None:
        raise run.fault(f"{name} fails on {card.name}")
    return -1 if run.out_of_memory or run.stopped else card.usable_bytes - run.profile.peak.device


def maximum_that_fits(
    recipe: Recipe,
    leaf: str,
    card: virtual_gpu.Card,
    submit: Submit,
    *,
    limit: int,
    step: int,
    note: Note,
    known: Mapping[int, int] = MappingProxyType({}),
    near: int | None = None,
) -> Maximum[RecipeRun]:
    """`largest_that_fits` of the field `leaf`, the recipe's steps run on the card.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    return largest_that_fits(
        lambda number: submit(replace_field(recipe, leaf, number), card),
        lambda run: room_left(run, card, recipe.name),
        start=int(getattr(recipe.batch, leaf)),
        limit=limit,
        step=step,
        note=note,
        known=known,
        near=near,
    )


def longest(recipe: Recipe, card: virtual_gpu.Card, server: virtual_gpu.Server, *, limit: int, step: int) -> Longest:
    """The longest sequence of `recipe` on `card`, within what a job can count on there; a bar shows what is tried.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    with tqdm(desc=recipe.name, unit="run") as bar:

        def note(length: int, fits: bool) -> None:
            bar.update(1)
            bar.set_postfix_str(f"{length:,} tokens {'fit' if fits else 'do not fit'}")

        submit = functools.partial(submit_recipe, server)
        found = maximum_that_fits(shortened(recipe), "max_seq_length", card, submit, limit=limit, step=step, note=note)
    run, end = found.run or RecipeRun(None), found.next_value
    held = (run.peak, run.floor_bytes, run.pinned_host_bytes, run.micro_batch_launches)
    return Longest(recipe.name, card.name, found.value, end, "memory" if end else "limit", *held)


def largest_that_fits(
    probe: Callable[[int], "Future[Run]"],
    room: Callable[[Run], int],
    *,
    start: int,
    limit: int,
    step: int,
    note: Note,
    known: Mapping[int, int] = MappingProxyType({}),
    near: int | None = None,
) -> Maximum[Run]:
    """The largest multiple of `step` up to `limit` at which `probe` leaves room, taking need to grow with the number.

    Need is nearly a line, so two numbers whose need is known say where it will run out: the multiple below and the one
    above are run next, side by side. Where a line says nothing new, or the last guess did not halve what is open, the
    middle is run. What is known beforehand only helps to guess: the answer, and that the next does not fit, are runs.

    Args:
        room: bytes that a run left; negative if it did not fit, and exactly -1 if nobody knows by how much.
        start: the number to begin with.
        note: told each number that was run, and whether it fits.
        known: room at numbers, of this step or not, that is known beforehand.
        near: where to look first, after the start.
    """
    rooms = dict(known)
    seen: dict[int, bool] = {}
    good, bad, best = 0, limit // step * step + step, None
    tries = _first_tries(rooms, start, bad, step, near) if bad > step else []
    while tries:
        runs = {number: probe(number) for number in tries}
        before = bad - good
        for number in tries:
            run = runs[number].result()
            left = room(run)
            seen[number] = left >= 0
            note(number, seen[number])
            if left != -1:
                rooms[number] = left
            if not seen[number]:
                bad = min(bad, number)
            elif good < number < bad:
                good, best = number, run
        tries = _next_tries(rooms, good, bad, step, open_ended=bad not in seen, stalled=2 * (bad - good) > before)
    return Maximum(good, bad if bad in seen else 0, best)


def _first_tries(rooms: Mapping[int, int], start: int, bad: int, step: int, near: int | None) -> list[int]:
    """The start, and where to look; the start alone where nobody knows."""
    begin = min(max(start // step, 1) * step, bad - step)
    end = near if near is not None else _where_it_runs_out(rooms, bad)
    if end is None:
        return [begin]
    guesses = _around(end, step, 2 * end if near is not None else max(rooms))
    first = [begin] if begin in rooms or not rooms else []
    return sorted({min(max(number, step), bad - step) for number in (*first, *guesses)})


def _next_tries(
    rooms: Mapping[int, int], good: int, bad: int, step: int, *, open_ended: bool, stalled: bool
) -> list[int]:
    """The multiples strictly between `good` and `bad` to run next, smallest first; none when nothing is open.

    Args:
        open_ended: `bad` was not run; it is the first beyond the limit.
    """
    if bad - good <= step:
        return []
    agreeing = {number: left for number, left in rooms.items() if (number < bad if left >= 0 else number > good)}
    end = _where_it_runs_out(agreeing, bad)
    if stalled and not open_ended:
        guesses = [_middle(good, bad, step)]
    elif end is not None:
        guesses = _around(end, step, max(agreeing))
    elif good:
        guesses = [2 * good, 4 * good]
    else:
        guesses = [_middle(good, bad, step)]
    if open_ended:  # past the limit, the limit itself
        guesses = [min(guess, bad - step) for guess in guesses]
    tries = sorted({guess for guess in guesses if good < guess < bad})
    return tries or [_middle(good, bad, step)]


def _around(end: int, step: int, furthest: int) -> list[int]:
    """The multiples on both sides of a line's end; one, where that is far beyond the furthest that is known."""
    guess = end // step * step
    return [guess, guess + step] if guess <= 2 * furthest else [guess]


def _middle(good: int, bad: int, step: int) -> int:
    return max((good + bad) // 2 // step * step, good + step)


def _where_it_runs_out(rooms: Mapping[int, int], bad: int) -> int | None:
    """Where the line through the largest that fits and another number comes to no room, `bad` at most; None where there
    is no line.

    The other is the smallest that does not fit, if there is one; else one that fits and is well below, since the
    allocator takes whole segments and two numbers close to each other say little of the slope.
    """
    fitting = sorted(number for number, left in rooms.items() if left >= 0)
    if not fitting or len(rooms) < 2:
        return None
    good = fitting[-1]
    over = [number for number in rooms if number > good]
    well_below = [number for number in fitting if 4 * number <= 3 * good]
    other = min(over) if over else max(well_below, default=fitting[0])
    slope = (rooms[other] - rooms[good]) / (good - other) if other != good else 0.0
    return int(min(good + rooms[good] / slope, bad)) if slope > 0 else bad
