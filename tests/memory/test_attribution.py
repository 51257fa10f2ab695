"""Kinds sum to the peaks, always; what a table and a timeline are made of."""

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory.allocator import Allocator

from qlora_lowmem.memory.attribution import MAX_POINTS, Attribution, Evidence, chosen_events, explain
from qlora_lowmem.memory.history import History, replay
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED, ProgramNamer, RecipeNamer
from qlora_lowmem.memory.owners import Owner
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.memory.scopes import Scope
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results.kinds.attribution import markdown, owners_table, picture_as

MIB = 2**20
SCOPES = (
    Scope("forward", "model.layers.0.mamba", "mamba"),
    Scope("recompute", "model.layers.1.self_attn", "attention", "", "Attention"),
    Scope("backward", "model.layers.1.shared_mlp", "mlp", "MulBackward0"),
    Scope("backward", "lm_head", "loss", "MmBackward0"),
    Scope("optimizer"),
    Scope("between"),
)
FRAMES = (
    [],
    [{"filename": "/x/site-packages/bitsandbytes/functional.py", "line": 1, "name": "dequantize_4bit"}],
    [{"filename": "/x/site-packages/somewhere/else.py", "line": 7, "name": "work"}],
)
allocations = st.tuples(st.integers(1, 30 * MIB), st.integers(-1, len(SCOPES) - 1), st.sampled_from(FRAMES))
actions = st.lists(st.one_of(allocations, st.integers(0, 99)), min_size=1, max_size=50)


def explained(history: History, evidence: Evidence, peak: Peak) -> Attribution:
    profile = MemoryProfile("card", "virtual", 0, peak.device - peak.reserved, {"steady": peak})
    return explain(history, evidence, RecipeNamer(), profile, "steady")


def attributed(before: list[Any], during: list[Any], slack: int = 0, outside: int = 0) -> tuple[Attribution, Any]:
    allocator, living = Allocator(), []
    scopes = dict(enumerate(SCOPES, start=5))
    positions = list(scopes)

    def play(steps: list[Any]) -> None:
        for step in steps:
            if isinstance(step, tuple):
                size, scope, frames = step
                living.append(allocator.alloc(size, str(positions[scope]) if scope >= 0 else "", frames))
            elif living:
                allocator.free(living.pop(step % len(living)))

    play(before)
    start = allocator.snapshot()
    owned = {address: Owner("adapters", f"tensor {address}", "bfloat16 (8,)") for address in living[::2]}
    evidence = Evidence(scopes, owned)
    allocator.trace.clear()
    play(during)
    evidence.at_end = {address: Owner("gradients", "grad", "") for address in living[1::2]}
    evidence.seen = [(positions[-1] + 1, address, Owner("checkpoints", "input", "")) for address in living[2::3]]
    history = replay(start, allocator.snapshot())
    peak = history.peak_bytes
    highest = Peak(peak, peak + slack, peak + slack + outside)
    return explained(history, evidence, highest), history


@settings(deadline=None)
@given(before=actions, during=actions, slack=st.integers(0, MIB), outside=st.integers(0, MIB))
def test_kinds_sum_to_the_peaks(before: list[Any], during: list[Any], slack: int, outside: int) -> None:
    found, history = attributed(before, during, slack, outside)

    assert sum(found.kinds.values()) == found.device_bytes
    within = [count for kind, count in found.kinds.items() if kind not in OUTSIDE_ALLOCATED]
    assert sum(within) == found.allocated_bytes == history.peak_bytes
    requested = sum(owner.bytes for owner in found.owners)
    assert requested + found.kinds.get("rounding", 0) <= found.allocated_bytes
    timeline = found.timeline
    sums = [sum(row) for row in timeline.bytes]
    assert sums == [history.totals[event + 1] for event in timeline.events]
    assert max(sums) == found.allocated_bytes
    assert msgspec.json.decode(msgspec.json.encode(found), type=Attribution) == found


def test_what_nobody_knows_is_unexplained_and_listed() -> None:
    found, _ = attributed([0], [(3 * MIB, len(SCOPES) - 1, FRAMES[2]), (512, 0, [])])

    assert found.kinds["unexplained"] == 3 * MIB
    assert [owner.line for owner in found.owners if owner.kind == "unexplained"] == ["somewhere/else.py:7 work"]


def test_the_moment_is_where_the_youngest_blocks_code_ran() -> None:
    """Hooks see the forward that a tile's backward recomputes, and not the backward itself."""
    scan = [{"filename": "/x/qlora_lowmem/lean/scan.py", "line": 1, "name": "_backward"}]
    by_code, _ = attributed([], [(MIB, 1, scan)])
    by_hooks, _ = attributed([], [(MIB, 1, [])])

    assert by_code.moment == "backward of model.layers.1"  # of which the scope does not know the class
    assert by_hooks.moment == "recompute of model.layers.1.self_attn (Attention)"


def test_bytes_that_the_history_missed_are_unexplained() -> None:
    found, history = attributed([0], [(2048, 0, [])])
    evidence = Evidence({})
    highest = Peak(4096, 8192, 8192)

    assert explained(history, evidence, highest).kinds["unexplained"] >= 4096 - found.allocated_bytes


def test_scopes_of_an_earlier_window_are_not_read() -> None:
    """Nor what is no position: notes are anyone's to write."""
    allocator, start = Allocator(), Allocator().snapshot()
    for note in ("10", "9", "11", "", "a note of somebody else"):
        allocator.alloc(2 * MIB, note, FRAMES[2])
    history = replay(start, allocator.snapshot())
    assert [block.position for block in history.blocks] == [10, 9, 11, -1, -1]
    found = explained(history, Evidence({10: Scope("optimizer")}), Peak(*[history.peak_bytes] * 3))
    assert found.kinds == {"optimizer_step": 2 * MIB, "unexplained": 8 * MIB}


def test_an_owner_decides() -> None:
    """Whatever code allocated its block, and whose job it is."""
    allocator, scopes = Allocator(), {0: SCOPES[2]}
    start = allocator.snapshot()
    address = allocator.alloc(2 * MIB, "0", FRAMES[1])
    history = replay(start, allocator.snapshot())
    profile = MemoryProfile("card", "virtual", 0, 0, {"steady": Peak(*[history.peak_bytes] * 3)})
    evidence = Evidence(scopes, at_end={address: Owner("gradients", "a.grad", "")})
    for namer in (RecipeNamer(), ProgramNamer()):
        assert explain(history, evidence, namer, profile, "steady").kinds == {"gradients": 2 * MIB}


def test_a_program_and_a_recipe_are_two_namers_of_the_same_blocks() -> None:
    """What is alike comes out alike; what differs is who says it."""
    allocator, scopes = Allocator(), {0: Scope("outside"), 1: Scope("forward", "layers.0.mlp", "mlp", "", "Mlp")}
    start = allocator.snapshot()
    mine = [{"filename": "/home/me/project/test_it.py", "line": 3, "name": "test_it"}]
    allocator.alloc(2 * MIB, "0", mine)
    allocator.alloc(4 * MIB, "1", FRAMES[1])
    history = replay(start, allocator.snapshot())
    profile = MemoryProfile("card", "virtual", 0, 0, {"test": Peak(*[history.peak_bytes] * 3)})
    recipe, program = (
        explain(history, Evidence(scopes), namer, profile, "test")
        for namer in (RecipeNamer(), ProgramNamer("home/me/project/"))
    )
    assert recipe.kinds == {"dequantised": 4 * MIB, "unexplained": 2 * MIB}
    assert program.kinds == {"activations_mlp": 4 * MIB, "input": 2 * MIB}
    assert [owner.line for owner in program.owners][1] == "test_it.py:3 test_it"
    assert recipe.moment == program.moment == "forward of layers.0.mlp (Mlp)"
    assert recipe.modules == program.modules == {"": 2 * MIB, "layers.0": 4 * MIB}


def test_a_block_belongs_to_whoever_held_it_then() -> None:
    """The address of a checkpoint that was freed, and taken again by another tensor."""
    allocator, scopes = Allocator(), dict(enumerate((SCOPES[0], SCOPES[0], SCOPES[1])))
    start = allocator.snapshot()
    address = allocator.alloc(3 * MIB, "0")
    allocator.free(address)
    again = allocator.alloc(3 * MIB - 600, "2")
    assert again == address
    evidence = Evidence(scopes, {}, seen=[(1, address, Owner("checkpoints", "input", ""))])
    history = replay(start, allocator.snapshot())

    found = explained(history, evidence, Peak(history.peak_bytes, 0 + history.peak_bytes, 3 * 3 * MIB))

    assert found.kinds["checkpoints"] == 3 * MIB
    assert "recomputed_attention" not in found.kinds
    assert found.timeline.kinds == ("checkpoints", "recomputed_attention", "rounding")


@pytest.mark.parametrize(
    "change", [{"allocated_bytes": 1}, {"device_bytes": 1}, {"kinds": {"no kind": 5}}, {"kinds": {"loss": -1}}]
)
def test_sums_that_do_not_hold_are_refused(change: dict[str, Any]) -> None:
    found, _ = attributed([0], [(2048, 0, [])])

    with pytest.raises(ValueError, match=r"sum to|not a kind"):
        dataclasses.replace(found, **change)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3000))
def test_few_points_keep_the_peak_and_both_ends(totals: list[int]) -> None:
    chosen = chosen_events(totals)

    assert len(chosen) <= MAX_POINTS
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] == len(totals) - 1
    assert max(totals[index] for index in chosen) == max(totals)


def test_table_and_picture() -> None:
    found, _ = attributed([(MIB, 0, [])], [(5 * MIB, index, FRAMES[2]) for index in range(5)], MIB, 3 * MIB)

    table = markdown(found, "a recipe", MIB)
    assert f"{found.allocated_bytes:,}" in table
    assert table.index("**allocated**") < table.index("CUDA context") < table.index("**on the card**")
    assert all(KINDS[kind] in table for kind in found.kinds)
    assert "somewhere/else.py:7 work" in owners_table(found)

    pytest.importorskip("matplotlib")
    drawn = picture_as("svg", found, Recipe("mine"))
    assert b"on the card" in drawn
    assert drawn == picture_as("svg", found, Recipe("mine"))
    assert picture_as("png", found, Recipe("mine")).startswith(b"\x89PNG")
