"""A run held against its baseline. A verdict is data; it renders itself at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from qlora_lowmem.gate.records import VERSION_FIELDS, Difference, difference
from qlora_lowmem.results.kinds.verdicts import Record
from qlora_lowmem.units import MIB, format_bytes, format_signed

Name = Literal["PASS", "REGRESSED", "IMPROVED", "NOT COMPARABLE", "NEW", "MISSING"]


@dataclass(frozen=True)
class Tolerance:
    """How far two equal runs may lie apart: the larger of `absolute` bytes and a share `relative` of the baseline."""

    absolute: int = 0
    relative: float = 0.0

    def bytes(self, baseline: int) -> int:
        """In bytes, for a baseline of that many."""
        return max(self.absolute, int(self.relative * baseline))


@dataclass(frozen=True)
class Gate:
    """The tolerances of a device.

    Attributes:
        allocated: what is gated on.
        reserved: looser, since segments depend on the order of allocations.
    """

    allocated: Tolerance
    reserved: Tolerance


RESERVED = Tolerance(64 * MIB, 0.02)
EXACT = Gate(Tolerance(), RESERVED)  # a virtual card: the same run, the same bytes
MEASURED = Gate(Tolerance(2 * MIB, 0.005), RESERVED)  # library workspaces chosen by timing, NVML's granularity


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one case."""

    name: ClassVar[Name]
    fails: ClassVar[bool] = False
    case: str

    def render(self) -> str:
        """For a terminal: one line, or more where something is to be done."""
        return f"{self.case}: {self.name}"


@dataclass(frozen=True)
class _Compared(Verdict):
    baseline: Record
    measured: Record

    @property
    def bytes(self) -> int:
        """Allocated bytes more than the baseline's, negative for less."""
        return self.measured.allocated - self.baseline.allocated

    def _sizes(self) -> str:
        return (
            f"allocated {format_bytes(self.measured.allocated)} ({self.measured.allocated:,} bytes), "
            f"baseline {format_bytes(self.baseline.allocated)}, "
            f"difference {format_signed(self.bytes)} ({self.bytes:+,} bytes)"
        )


@dataclass(frozen=True)
class Pass(_Compared):
    """Within tolerance of the baseline."""

    name = "PASS"


@dataclass(frozen=True)
class Regressed(_Compared):
    """More than the baseline and its tolerance.

    Attributes:
        what: the figure that is over: `allocated` or `reserved`.
        allowed: its tolerance in bytes.
        artefacts: files that the failing run left: its attribution, its snapshot.
    """

    name = "REGRESSED"
    fails = True
    what: str
    allowed: int
    artefacts: tuple[str, ...] = ()

    @property
    def difference(self) -> Difference:
        """Where the bytes came from."""
        return difference(self.baseline, self.measured)

    def render(self) -> str:
        over = getattr(self.measured, self.what) - getattr(self.baseline, self.what)
        lines = [
            f"{self.case}: REGRESSED on {self.measured.key.device} ({self.measured.key.provenance})",
            self._sizes(),
        ]
        if self.what != "allocated":
            lines.append(f"{self.what} grew by {format_bytes(over)}; allowed are {format_bytes(self.allowed)}")
        lines += ["", self.difference.render()]
        if self.artefacts:
            lines += ["", f"kept of this run: {', '.join(self.artefacts)}"]
        lines += ["", f"If it is meant: pytest --record={self.case} ... writes the new baseline."]
        return "\n".join(lines)


@dataclass(frozen=True)
class Improved(_Compared):
    """Less than the baseline, by more than the tolerance."""

    name = "IMPROVED"

    def render(self) -> str:
        return (
            f"{self.case}: IMPROVED: {self._sizes()}\n"
            f"Keep it: pytest --record={self.case} ... writes the new baseline, and a later return to the old peak is "
            "then a regression."
        )


@dataclass(frozen=True)
class NotComparable(_Compared):
    """The baseline was recorded under something else.

    Attributes:
        keys: what differs: name to (baseline, now).
    """

    name = "NOT COMPARABLE"
    fails = True
    keys: Mapping[str, tuple[str, str]]

    def render(self) -> str:
        differs = "\n".join(
            f"  {name}: {old or '-'} in the baseline, {new or '-'} now" for name, (old, new) in self.keys.items()
        )
        lines = [f"{self.case}: NOT COMPARABLE with its baseline", differs, f"all the same: {self._sizes()}"]
        found = difference(self.baseline, self.measured)
        if found.explained and self.bytes:
            lines += ["", found.render()]
        if set(self.keys) <= set(VERSION_FIELDS):
            lines += [
                "",
                "Install the baseline's versions to gate; or --across-versions to hold these against it all the same;",
                "or record them: pytest --record ... Which package did it: python -m qlora_lowmem.gate.bisect --help",
            ]
        else:
            lines += ["", f"Record it as it is now: pytest --record={self.case} ..."]
        return "\n".join(lines)


@dataclass(frozen=True)
class New(Verdict):
    """There is no baseline for it."""

    name = "NEW"
    measured: Record

    def render(self) -> str:
        return (
            f"{self.case}: NEW: {format_bytes(self.measured.allocated)} allocated, no baseline for it. "
            f"pytest --record={self.case} ... writes one."
        )


@dataclass(frozen=True)
class Missing(Verdict):
    """There is a baseline, and no such case any more."""

    name = "MISSING"
    fails = True
    baseline: Record

    def render(self) -> str:
        return (
            f"{self.case}: MISSING: its baseline has {format_bytes(self.baseline.allocated)}, and no case of that name "
            "ran. Bring it back, or take its baseline out: pytest --record ... with every case."
        )


def compare(
    case: str, baseline: Record | None, measured: Record, gate: Gate, *, across_versions: bool = False
) -> Verdict:
    """The verdict on a run.

    Args:
        across_versions: hold it against a baseline of other package versions all the same.
    """
    if baseline is None:
        return New(case, measured)
    keys = baseline.key.differences(measured.key)
    if across_versions:
        keys = {name: pair for name, pair in keys.items() if name not in VERSION_FIELDS}
    if keys:
        return NotComparable(case, baseline, measured, keys)
    grown = measured.allocated - baseline.allocated
    allowed = gate.allocated.bytes(baseline.allocated)
    if grown > allowed:
        return Regressed(case, baseline, measured, "allocated", allowed)
    allowed_reserved = gate.reserved.bytes(baseline.reserved)
    if measured.reserved - baseline.reserved > allowed_reserved:
        return Regressed(case, baseline, measured, "reserved", allowed_reserved)
    return Improved(case, baseline, measured) if -grown > allowed else Pass(case, baseline, measured)
