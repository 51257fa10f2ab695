"""A run held against its baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_lowmem.gate.records import VERSION_FIELDS, difference
from qlora_lowmem.results.kinds.verdicts import Record
from qlora_lowmem.units import MIB, format_bytes, format_signed

Name = Literal[
    "PASS", "REGRESSED", "IMPROVED", "NOT COMPARABLE", "NEW", "MISSING", "WITHIN BUDGET", "OVER BUDGET", "NOT COUNTED"
]  # fmt: skip
ALWAYS = frozenset(("OVER BUDGET", "NOT COUNTED"))  # these fail whatever is recorded or only reported
FAILING = ALWAYS | {"REGRESSED", "NOT COMPARABLE", "MISSING"}
QUIET = frozenset(("PASS", "WITHIN BUDGET"))  # what needs nobody's attention


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
    """The tolerances of a device. That of `reserved` is looser, since segments depend on the order of allocations."""

    allocated: Tolerance
    reserved: Tolerance


RESERVED = Tolerance(64 * MIB, 0.02)
EXACT = Gate(Tolerance(), RESERVED)  # a virtual card: the same run, the same bytes
MEASURED = Gate(Tolerance(2 * MIB, 0.005), RESERVED)  # library workspaces chosen by timing, NVML's granularity


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one case.

    Attributes:
        found: what was found, in words for a terminal; empty for what is quiet.
        kept: introduces the files that a failing run left, where they are to be told.
        advice: what to do.
    """

    name: Name
    found: str = ""
    kept: str = ""
    advice: str = ""

    @property
    def fails(self) -> bool:
        """Whether the case fails for it."""
        return self.name in FAILING

    def render(self, artefacts: Sequence[str] = ()) -> str:
        """All of it, with the files that a failing run left."""
        files = f"{self.kept}: {', '.join(artefacts)}" if self.kept and artefacts else ""
        return "\n\n".join(part for part in (self.found, files, self.advice) if part)


def compare(
    case: str, baseline: Record | None, measured: Record, gate: Gate, *, across_versions: bool = False
) -> Verdict:
    """The verdict on a run; with `across_versions` also against a baseline of other package versions."""
    record_it = f"pytest --vram-record={case} ... writes"
    if baseline is None:
        size = format_bytes(measured.allocated)
        return Verdict("NEW", f"{case}: NEW: {size} allocated, no baseline for it. {record_it} one.")
    keys = baseline.key.differences(measured.key)
    if across_versions:
        keys = {name: pair for name, pair in keys.items() if name not in VERSION_FIELDS}
    grown = measured.allocated - baseline.allocated
    sizes = (
        f"allocated {format_bytes(measured.allocated)} ({measured.allocated:,} bytes), "
        f"baseline {format_bytes(baseline.allocated)}, difference {format_signed(grown)} ({grown:+,} bytes)"
    )
    if keys:
        return _not_comparable(case, baseline, measured, keys, sizes)
    for figure, tolerance in (("allocated", gate.allocated), ("reserved", gate.reserved)):
        before, now = getattr(baseline, figure), getattr(measured, figure)
        allowed = tolerance.bytes(before)
        if now - before > allowed:
            found = f"{case}: REGRESSED on {measured.key.device} ({measured.key.provenance})\n{sizes}"
            if figure != "allocated":
                found += f"\n{figure} grew by {format_bytes(now - before)}; allowed are {format_bytes(allowed)}"
            found += f"\n\n{difference(baseline, measured).render()}"
            return Verdict("REGRESSED", found, "kept of this run", f"If it is meant: {record_it} the new baseline.")
    launched = launches_grown(baseline, measured)
    counts = f"launches {measured.launches:,}, baseline {baseline.launches:,}" if launched else ""
    if launched > 0:
        found = f"{case}: REGRESSED on {measured.key.device} ({measured.key.provenance})\n{counts}, {launched:+,}"
        found += f"\n{sizes}\n\n{difference(baseline, measured).render()}"
        return Verdict("REGRESSED", found, "kept of this run", f"If it is meant: {record_it} the new baseline.")
    less = -grown > gate.allocated.bytes(baseline.allocated)
    if not less and not launched:
        return Verdict("PASS")
    return Verdict(
        "IMPROVED",
        f"{case}: IMPROVED: {'; '.join(text for text in (sizes if less else '', counts) if text)}\n"
        f"Keep it: {record_it} the new baseline, and a later return to the old peak is then a regression.",
    )


def launches_grown(baseline: Record, measured: Record) -> int:
    """How many launches there are more, exactly; 0 where one of both has not counted them."""
    if baseline.launches is None or measured.launches is None:
        return 0
    return measured.launches - baseline.launches


def _not_comparable(
    case: str, baseline: Record, measured: Record, keys: dict[str, tuple[str, str]], sizes: str
) -> Verdict:
    differs = "\n".join(
        f"  {name}: {old or '-'} in the baseline, {new or '-'} now" for name, (old, new) in keys.items()
    )
    found = f"{case}: NOT COMPARABLE with its baseline\n{differs}\nall the same: {sizes}"
    changed = difference(baseline, measured)
    if changed.kinds and measured.allocated != baseline.allocated:
        found += f"\n\n{changed.render()}"
    advice = (
        "Install the baseline's versions to gate; or --vram-across-versions to hold these against it all the same;\n"
        "or record them: pytest --vram-record ... Which package did it: python -m qlora_lowmem.gate.bisect --help"
    )
    if not set(keys) <= set(VERSION_FIELDS):
        advice = f"Record it as it is now: pytest --vram-record={case} ..."
    return Verdict("NOT COMPARABLE", found, advice=advice)


def missing(case: str, baseline: Record) -> Verdict:
    """There is a baseline, and no such case any more."""
    return Verdict(
        "MISSING",
        f"{case}: MISSING: its baseline has {format_bytes(baseline.allocated)}, and no case of that name "
        "ran. Bring it back, or take its baseline out: pytest --vram-record ... with every case.",
    )


def not_counted(case: str, record: Record, processes: Sequence[str]) -> Verdict:
    """Other processes of a test used a real GPU, of which only the test's own process is measured."""
    return Verdict(
        "NOT COUNTED",
        f"{case}: NOT COUNTED: {', '.join(processes)} of this test used {record.key.device} too, and what was held "
        f"there is in no figure; this process alone had {format_bytes(record.allocated)} allocated.",
        advice="Leave --vram-gpu out: a virtual card counts all processes of a test. Or let the test do the work.",
    )
