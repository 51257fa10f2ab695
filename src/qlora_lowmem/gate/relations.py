"""What must hold between two profiles whatever the card: assertions that outlive a change of hardware or versions.

assert_less(profile("r8"), profile("r16"))
assert_at_most_share(profile("seq512"), 0.6, of=profile("seq1024"))
assert_monotone({256: a, 512: b, 1024: c}, in_="sequence length")
"""

import itertools
from collections.abc import Mapping

from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.units import format_bytes, format_signed

Profile = MemoryProfile | int


def peak(profile: Profile) -> int:
    """The allocated peak in bytes."""
    return profile if isinstance(profile, int) else profile.peak.allocated


def assert_less(
    less: Profile, more: Profile, why: str = "", names: tuple[str, str] = ("the first", "the second")
) -> None:
    """Raises:
    AssertionError: the first does not need less than the second.
    """
    __tracebackhide__ = True
    relation = f"{names[0]} should need less memory than {names[1]}"
    _require(peak(less) < peak(more), relation, why, peak(less), peak(more))


def assert_at_most_share(
    part: Profile, share: float, *, of: Profile, why: str = "", names: tuple[str, str] = ("the first", "the second")
) -> None:
    """Raises:
    AssertionError: the first needs more than that share of the second.
    ValueError: `share` is not above 0.
    """
    __tracebackhide__ = True
    if share <= 0:
        raise ValueError(f"share is {share}; it must be above 0, as in 0.5 for half")
    found = peak(part) / peak(of) if peak(of) else float("inf")
    relation = f"{names[0]} should need at most {share:.3g} of {names[1]} and needs {found:.4g} of it"
    _require(peak(part) <= share * peak(of), relation, why, peak(part), peak(of))


def assert_monotone(profiles: Mapping[float, Profile], *, in_: str, strictly: bool = True, why: str = "") -> None:
    """Memory grows with a knob.

    Args:
        profiles: by the knob's value, in any order.
        in_: the knob's name.
        strictly: equal peaks break it too.

    Raises:
        AssertionError: a larger value needs less, or as much.
        ValueError: fewer than two values.
    """
    __tracebackhide__ = True
    if len(profiles) < 2:
        raise ValueError(f"{in_}: a relation needs at least two values, and there are {len(profiles)}")
    values = sorted(profiles)
    for small, large in itertools.pairwise(values):
        less, more = peak(profiles[small]), peak(profiles[large])
        relation = f"memory should grow with {in_}, and {in_} {small:g} against {large:g} does not"
        _require(less < more or (less == more and not strictly), relation, why, less, more)


def _require(holds: bool, relation: str, why: str, less: int, more: int) -> None:
    """Say what does not hold, in one or two lines; `less` and `more` are in bytes."""
    __tracebackhide__ = True
    if not holds:
        difference = f"({format_signed(less - more)}, {less - more:+,} bytes)"
        text = f"{relation}: {format_bytes(less)} against {format_bytes(more)} {difference}"
        raise AssertionError(f"{text}\nit should hold because: {why}" if why else text)
