"""Why a peak changed: two records side by side, by kind, module, line of code and package version."""

from collections.abc import Mapping
from dataclasses import dataclass

from tabulate import tabulate

from qlora_lowmem.gate.records import MAX_LINES
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.results.kinds.verdicts import Record
from qlora_lowmem.units import format_bytes, format_signed

_ROWS = 6


@dataclass(frozen=True)
class Change:
    """One row: a kind, module or line, and its bytes before and after; None where it was not there."""

    name: str
    before: int | None
    after: int | None

    @property
    def bytes(self) -> int:
        """How much more there is, negative for less."""
        return (self.after or 0) - (self.before or 0)

    @property
    def remark(self) -> str:
        """`new`, `gone` or nothing."""
        return "new" if self.before is None else "gone" if self.after is None else ""


@dataclass(frozen=True)
class Difference:
    """What changed from one record to another, the largest changes first.

    Attributes:
        kinds: by key of `memory.kinds.KINDS`.
        modules: by block of the model.
        lines: by `kind | line of code`; lines that only moved within their file cancel out.
        versions: packages that changed: name to (before, after).
    """

    kinds: tuple[Change, ...]
    modules: tuple[Change, ...]
    lines: tuple[Change, ...]
    versions: Mapping[str, tuple[str, str]]

    @property
    def explained(self) -> bool:
        """Whether both sides were attributed."""
        return bool(self.kinds or self.modules or self.lines)

    def grown(self) -> tuple[str, ...]:
        """The kinds of the allocated peak that grew, most first."""
        return tuple(c.name for c in self.kinds if c.bytes > 0 and c.name not in OUTSIDE_ALLOCATED)

    def render(self, rows: int = _ROWS) -> str:
        """Tables for a terminal."""
        parts = []
        for title, changes in (("kind", self.kinds), ("module", self.modules), ("line", self.lines)):
            if changes:
                parts.append(_table(title, changes, rows))
        changed = [f"{name} {old} -> {new}" for name, (old, new) in self.versions.items()]
        parts.append("packages: " + (", ".join(changed) if changed else "the same versions"))
        return "\n\n".join(parts)


def difference(before: Record, after: Record) -> Difference:
    """From the baseline `before` to the run `after`. Without attribution on both sides only versions are compared."""
    both = bool(before.kinds) and bool(after.kinds)
    everything = before.versions.keys() | after.versions.keys()
    versions = {
        name: (before.versions.get(name, "not recorded"), after.versions.get(name, "not recorded"))
        for name in sorted(everything)
        if before.versions.get(name) != after.versions.get(name)
    }
    return Difference(
        kinds=changes(before.kinds, after.kinds) if both else (),
        modules=changes(before.modules, after.modules) if both else (),
        lines=_line_changes(before.lines, after.lines) if both else (),
        versions=versions,
    )


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    """Entries that differ, the largest growth first and the largest saving last."""
    names = [*after, *(name for name in before if name not in after)]
    found = [Change(name, before.get(name), after.get(name)) for name in names]
    return tuple(sorted((change for change in found if change.bytes), key=lambda change: (-change.bytes, change.name)))


def _line_changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Change, ...]:
    """Records keep the largest lines only: a change that can be a line that came in or fell out at the end is none."""
    doubt = 2 * max((min(side.values()) for side in (before, after) if len(side) >= MAX_LINES), default=0)
    found = changes(_unnumbered(before), _unnumbered(after))
    return tuple(change for change in found if abs(change.bytes) > doubt)


def _unnumbered(lines: Mapping[str, int]) -> dict[str, int]:
    """Bytes by kind, file and function: line numbers move with every edit above them."""
    sums: dict[str, int] = {}
    for text, count in lines.items():
        place, _, function = text.rpartition(" ")
        file = place.rpartition(":")[0] or place
        key = f"{file} {function}"
        sums[key] = sums.get(key, 0) + count
    return sums


def _table(title: str, found: tuple[Change, ...], rows: int) -> str:
    """The largest in size, whatever their sign, in the order of `found`."""
    largest = sorted(found, key=lambda change: -abs(change.bytes))[:rows]
    body = [
        [
            KINDS.get(change.name, change.name) if title == "kind" else change.name or "(outside of the model)",
            _size(change.before),
            _size(change.after),
            format_signed(change.bytes),
            change.remark,
        ]
        for change in found
        if change in largest
    ]
    return tabulate(
        body,
        headers=[title, "baseline", "now", "difference", ""],
        tablefmt="simple",
        disable_numparse=True,
        colalign=("left", "right", "right", "right", "left"),
    )


def _size(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)
