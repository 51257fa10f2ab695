"""The replay of the allocator's history, against an allocator that keeps its own books."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory.allocator import Allocator

from qlora_lowmem.memory.history import BEFORE, Block, History, replay

MIB = 2**20

sizes = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(MIB, 40 * MIB))
# An allocation of so many bytes, a free of one of the living, or a release of empty segments.
steps = st.lists(st.one_of(sizes, st.tuples(st.integers(0, 1000)), st.none()), max_size=60)


def play(allocator: Allocator, living: list[int], actions: list[Any]) -> list[int]:
    """Do `actions`; returns what was allocated after each."""
    seen = []
    for action in actions:
        if action is None:
            allocator.release()
        elif isinstance(action, int):
            living.append(allocator.alloc(action))
        elif living:
            allocator.free(living.pop(action[0] % len(living)))
        seen.append(allocator.allocated)
    return seen


def alive_after(history: History, event: int) -> list[Block]:
    return [block for block in history.blocks if block.born <= event < block.died]


@settings(deadline=None)
@given(before=steps, after=steps)
def test_replay_keeps_the_allocators_books(before: list[Any], after: list[Any]) -> None:
    allocator, living = Allocator(), []
    play(allocator, living, before)
    allocator.trace.clear()
    start = allocator.snapshot()
    at_start = allocator.allocated
    seen = play(allocator, living, after)

    history = replay(start, allocator.snapshot())

    assert history.faults == 0
    assert history.totals[0] == at_start
    assert history.totals[-1] == allocator.allocated
    assert history.peak_bytes == max([at_start, *seen])
    alive = alive_after(history, history.peak_event)
    assert sum(block.size for block in alive) == history.peak_bytes
    assert all(block.requested <= block.size for block in alive)


def test_a_block_takes_the_rest_that_is_too_small_to_split_off() -> None:
    allocator = Allocator()
    start = allocator.snapshot()
    allocator.alloc(19 * MIB + 1)  # rounded to a segment of 20 MiB: the rest, just under 1 MiB, stays with the block

    history = replay(start, allocator.snapshot())

    assert [block.size for block in history.blocks] == [20 * MIB]
    assert history.peak_bytes == allocator.allocated == 20 * MIB


def test_what_was_there_before_comes_from_the_segments() -> None:
    allocator = Allocator()
    first = allocator.alloc(1000)
    allocator.trace.clear()
    start = allocator.snapshot()
    allocator.free(first)
    allocator.alloc(300)

    history = replay(start, allocator.snapshot())

    assert [(block.born, block.size) for block in history.blocks] == [(BEFORE, 1024), (2, 512)]
    assert history.peak_event == BEFORE
    assert [block.requested for block in alive_after(history, BEFORE)] == [1000]


def test_a_free_of_what_was_never_seen_is_a_fault_and_changes_no_sum() -> None:
    allocator = Allocator()
    allocator.alloc(1000)
    allocator.trace.clear()
    start = allocator.snapshot()
    allocator.trace.append({"action": "free_requested", "addr": 1, "size": 10, "time_us": 0})

    history = replay(start, allocator.snapshot())

    assert history.faults == 1
    assert history.peak_bytes == 1024


def test_a_block_in_use_by_another_stream_is_not_allocated_but_keeps_its_place() -> None:
    allocator = Allocator()
    block = allocator.alloc(2 * MIB)
    allocator.trace.clear()
    start = allocator.snapshot()
    allocator.free(block)
    after = allocator.snapshot()
    del after["device_traces"][0][1]  # not completed
    after["segments"][0]["blocks"] = start["segments"][0]["blocks"]
    after["segments"][0]["blocks"][0] |= {"state": "active_awaiting_free"}
    start = {"segments": [start["segments"][0] | {"blocks": [dict(b) for b in start["segments"][0]["blocks"]]}]}
    start["segments"][0]["blocks"][0]["state"] = "active_allocated"

    history = replay(start, after)

    assert history.faults == 0
    assert list(history.totals) == [2 * MIB, 0]


@pytest.mark.parametrize("first", [4 * MIB, 6 * MIB])
def test_an_expandable_segment_grows_and_shrinks(first: int) -> None:
    """Mapped ranges that touch are one segment: a block may lie across them."""
    trace = [
        {"action": "segment_map", "addr": 0, "size": first},
        {"action": "segment_map", "addr": first, "size": 2 * MIB},
        {"action": "alloc", "addr": 0, "size": first + 2 * MIB - 512},
        {"action": "free_requested", "addr": 0, "size": 0},
        {"action": "free_completed", "addr": 0, "size": 0},
        {"action": "segment_unmap", "addr": 2 * MIB, "size": first},
        {"action": "alloc", "addr": 0, "size": 2 * MIB},
    ]
    blocks = [{"address": 0, "size": 2 * MIB, "requested_size": 2 * MIB, "state": "active_allocated"}]
    end = {"device": 0, "address": 0, "total_size": 2 * MIB, "is_expandable": True, "blocks": blocks}

    history = replay({"segments": []}, {"segments": [end], "device_traces": [trace]})

    assert history.faults == 0
    assert list(history.totals)[2:] == [0, first + 2 * MIB - 512, 0, 0, 0, 2 * MIB]
