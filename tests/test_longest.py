"""The search for the longest sequence: never wrong about a card whose need grows with the length."""

from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.longest import longest_sequence
from qlora_lowmem.memory.profile import MemoryProfile, PhasePeak
from qlora_lowmem.virtual_runs import RecipeRun

STEP = 1024


@given(
    bytes_a_token=st.integers(1, 50_000),
    jumps=st.lists(st.integers(0, 10**9), min_size=200, max_size=200),
    budget=st.integers(0, 6 * 10**9),
    limit=st.integers(1, 140).map(lambda n: n * STEP),
    start=st.integers(1, 200_000),
)
def test_it_finds_the_last_length_that_fits(
    bytes_a_token: int, jumps: list[int], budget: int, limit: int, start: int
) -> None:
    """Need is a line with jumps in it, as of an allocator that takes whole segments."""
    steps = sorted(jumps)
    probed: list[int] = []

    def need(length: int) -> int:
        return length * bytes_a_token + steps[length // STEP]

    def probe(length: int) -> "Future[RecipeRun]":
        probed.append(length)
        future: Future[RecipeRun] = Future()
        peak = PhasePeak("steady", 0, 0, need(length))
        future.set_result(RecipeRun(MemoryProfile("card", "virtual", budget, 0, (peak,))))
        return future

    def room(run: RecipeRun) -> int:
        assert run.profile is not None
        return budget - run.profile.peak_device_bytes

    good, bad, run = longest_sequence(
        probe, room, start=start, limit=limit, step=STEP, note=lambda _length, _fits: None
    )
    lengths = range(STEP, limit + 1, STEP)
    assert good == max((length for length in lengths if need(length) <= budget), default=0)
    assert bad == (0 if good == limit else good + STEP)
    assert (run is None) == (good == 0)
    assert len(probed) == len(set(probed)), "no length is run twice"
