"""Relations between profiles: what holds passes, what does not says by how much."""

import pytest

from qlora_lowmem.gate.relations import assert_at_most_share, assert_less, assert_monotone
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.units import MIB


def profile(allocated: int) -> MemoryProfile:
    return MemoryProfile("card", "virtual", 0, 0, {"load": Peak(0), "steady": Peak(allocated)})


def test_less() -> None:
    assert_less(profile(1), profile(2))
    with pytest.raises(
        AssertionError, match=r"r8 should need less memory than r16: 3.0 MiB against 2.0 MiB \(\+1.0 MiB"
    ):
        assert_less(3 * MIB, 2 * MIB, names=("r8", "r16"))
    with pytest.raises(AssertionError, match="it should hold because: half the rank"):
        assert_less(2, 2, why="half the rank")


def test_share() -> None:
    assert_at_most_share(60, 0.6, of=100)
    with pytest.raises(AssertionError, match=r"seq512 should need at most 0.6 of seq1024 and needs 0.61 of it"):
        assert_at_most_share(61, 0.6, of=100, names=("seq512", "seq1024"))
    with pytest.raises(ValueError, match="above 0"):
        assert_at_most_share(1, 0, of=100)


def test_monotone() -> None:
    assert_monotone({512: 2, 256: 1, 1024: 3}, in_="sequence length")
    assert_monotone({1: 5, 2: 5}, in_="rank", strictly=False)
    with pytest.raises(AssertionError, match="memory should grow with rank, and rank 1 against 2 does not"):
        assert_monotone({1: 5, 2: 5}, in_="rank")
    with pytest.raises(AssertionError, match=r"sequence length 512 against 1024 does not: 3 B against 2 B"):
        assert_monotone({256: 1, 1024: 2, 512: 3}, in_="sequence length")
    with pytest.raises(ValueError, match="at least two"):
        assert_monotone({1: 5}, in_="rank")
