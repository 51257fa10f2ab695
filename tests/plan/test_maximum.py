"""The search for the largest number that fits: never wrong where need grows with the number, and quick on a line."""

import random
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.plan.maximum import largest_that_fits

STEP = 1024


def answered(need: int) -> "Future[int]":
    future: Future[int] = Future()
    future.set_result(need)
    return future


@given(
    bytes_a_token=st.integers(1, 50_000),
    jumps=st.lists(st.integers(0, 10**9), min_size=200, max_size=200),
    budget=st.integers(0, 6 * 10**9),
    total=st.integers(0, 10**9),
    limit=st.integers(1, 140).map(lambda n: n * STEP),
    start=st.integers(1, 200_000),
    near=st.none() | st.integers(0, 200_000),
    known=st.dictionaries(st.integers(0, 200_000), st.integers(-(10**9), 10**10), max_size=4),
)
def test_it_finds_the_last_number_that_fits(
    bytes_a_token: int,
    jumps: list[int],
    budget: int,
    total: int,
    limit: int,
    start: int,
    near: int | None,
    known: dict[int, int],
) -> None:
    """Need is a line with jumps in it, as of an allocator that takes whole segments; past the total it is not known."""
    steps = sorted(jumps)
    probed: list[int] = []

    def need(length: int) -> int:
        return length * bytes_a_token + steps[length // STEP]

    def probe(length: int) -> "Future[int]":
        probed.append(length)
        return answered(need(length))

    def room(needed: int) -> int:
        return -1 if needed > budget + total else budget - needed

    good, bad, run = largest_that_fits(
        probe, room, start=start, limit=limit, step=STEP, note=lambda _length, _fits: None, known=known, near=near
    )
    lengths = range(STEP, limit + 1, STEP)
    assert good == max((length for length in lengths if need(length) <= budget), default=0)
    assert bad == (0 if good == limit else good + STEP)
    assert run == (need(good) if good else None)
    assert len(probed) == len(set(probed)), "no length is run twice"


@pytest.mark.parametrize(
    ("bytes_a_token", "start", "most"), [(600_000, 2048, 7), (90_000, 1024, 4), (5_000_000, 512, 5)]
)
def test_a_line_of_segments_takes_few_runs(bytes_a_token: int, start: int, most: int) -> None:
    """6 GB of which 5.5 GiB can be used, a base of 1.5 GiB, and segments of up to 20 MiB that come and go."""
    noise = random.Random(0)
    jumps = {length: noise.randrange(20 * 2**20) for length in range(256, 40_000, 256)}
    probed: list[int] = []

    def probe(length: int) -> "Future[int]":
        probed.append(length)
        return answered(3 * 2**29 + length * bytes_a_token + jumps[length])

    def room(needed: int) -> int:
        return -1 if needed > 6 * 2**30 else 11 * 2**29 - needed

    good, bad, _ = largest_that_fits(probe, room, start=start, limit=32_768, step=256, note=lambda _n, _f: None)
    assert bad == (good + 256 if good < 32_768 else 0)
    assert len(probed) <= most


@pytest.mark.parametrize(
    ("known", "near", "step", "most"),
    [({}, None, 256, 6), ({0: 1_150_000, 1024: 893_600}, None, 256, 4), ({0: 1_150_000, 1: 893_600}, 5, 1, 3)],
    ids=["nothing", "a floor", "as many tokens in longer samples"],
)
def test_what_is_known_beforehand_saves_runs(known: dict[int, int], near: int | None, step: int, most: int) -> None:
    """Room is 1,100,000 less 200 a token and, from 1,100 on, 180: a floor says nearly how far that goes."""
    probed: list[int] = []

    def probe(number: int) -> "Future[int]":
        probed.append(number)
        tokens = number if step > 1 else number * 1024
        return answered(1_100_000 - 180 * tokens - 20 * min(tokens, 1100))

    good, bad, left = largest_that_fits(
        probe,
        lambda left: left,
        start=1024 if step > 1 else 1,
        limit=32_768,
        step=step,
        note=lambda _number, _fits: None,
        known=known,
        near=near,
    )
    assert (good, bad) == ((5888, 6144) if step > 1 else (5, 6))
    assert left is not None
    assert left >= 0
    assert len(probed) <= most


def test_a_limit_below_the_step_is_no_number_at_all() -> None:
    assert largest_that_fits(answered, lambda _n: 1, start=1, limit=100, step=256, note=lambda _n, _f: None) == (
        0,
        0,
        None,
    )
