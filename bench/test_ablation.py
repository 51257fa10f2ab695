"""What must hold between recipes on any device."""

from collections.abc import Callable

import pytest

from qlora_lowmem.gate.relations import assert_at_most_share, assert_less, assert_monotone
from qlora_lowmem.memory.profile import MemoryProfile

Allocated = Callable[..., int]

# (less, more, why)
RELATIONS = [
    ("r8", "baseline", "half the rank: half the adapters, gradients and optimizer state"),
    ("seq1024", "baseline", "half the tokens: half the activations"),
    ("checkpointing", "baseline", "one layer's activations instead of all"),
    ("targets-qv", "baseline", "no adapters on k and o, and no inputs kept for them"),
    ("fused-loss", "baseline", "no (seq, vocabulary) logits in fp32"),
    ("optimised", "checkpointing", "half the tokens, no logits"),
    ("seq512", "optimised", "half the tokens"),
    ("seq256", "seq512", "half the tokens again"),
    ("r4", "optimised", "half the rank"),
    ("optimised-qv", "optimised", "adapters on two projections instead of four"),
    ("lean", "optimised", "layers in tiles, though every linear layer is trained"),
]


@pytest.fixture
def allocated(profile_of: Callable[[str], MemoryProfile]) -> Allocated:
    """The peak of a phase. In the first step what the cache holds from loading decides how large blocks are cut, by up
    to 1 MiB each, which hides what a few adapters take; the steady step has that behind it."""

    def get(name: str, phase: str = "steady") -> int:
        return profile_of(name).phases[phase].allocated

    return get


@pytest.mark.parametrize(("less", "more", "why"), RELATIONS, ids=[f"{a}<{b}" for a, b, _ in RELATIONS])
def test_less_memory(allocated: Allocated, less: str, more: str, why: str) -> None:
    assert_less(allocated(less), allocated(more), why, names=(less, more))


def test_accumulation_costs_its_batches_alone(allocated: Allocated) -> None:
    """Gradients are summed in place. What twice the accumulation adds is its batches, which the Trainer puts on the
    card together: 8 more of three (1, 1024) int64 tensors (ids, labels, mask)."""
    more = allocated("accumulation16") - allocated("optimised")
    assert more == 8 * 3 * 1024 * 8


def test_sequence_dominates_without_checkpointing(allocated: Allocated) -> None:
    """Activations grow with the tokens: half of them save at least 40 % of what the base model does not take."""
    base = allocated("baseline", "load")
    whole, half = allocated("baseline") - base, allocated("seq1024") - base
    assert_at_most_share(half, 0.6, of=whole, names=("seq1024", "baseline"))


def test_memory_grows_with_the_sequence(allocated: Allocated) -> None:
    peaks = {length: allocated(name) for length, name in ((256, "seq256"), (512, "seq512"), (1024, "optimised"))}
    assert_monotone(peaks, in_="sequence length")
