"""The search for the longest sequence: never wrong about a card whose need grows with the length."""

from concurrent.futures import Future
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.longest import longest_sequence
from qlora_lowmem.memory.profile import MemoryProfile, PhasePeak
from qlora_lowmem.virtual_runs import RecipeRun

RUN = RecipeRun(MemoryProfile("card", "virtual", 1, 0, (PhasePeak("steady", 0, 0, 0),)))


@given(threshold=st.integers(0, 200_000), limit=st.integers(1, 140).map(lambda n: n * 1024))
def test_it_finds_the_last_length_that_fits(threshold: int, limit: int) -> None:
    probed: list[int] = []

    def probe(length: int) -> "Future[RecipeRun]":
        probed.append(length)
        future: Future[RecipeRun] = Future()
        future.set_result(RUN if length <= threshold else replace(RUN, out_of_memory="no room"))
        return future

    good, bad, run = longest_sequence(
        probe, lambda run: run.out_of_memory is None, limit=limit, step=1024, note=lambda _length, _fit: None
    )
    assert good == min(threshold // 1024 * 1024, limit) or (threshold >= limit and good == limit)
    assert bad == (0 if good == limit else good + 1024)
    assert (run is None) == (good == 0)
    assert len(probed) == len(set(probed)) <= 25
