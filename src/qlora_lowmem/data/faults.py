"""What is wrong with training data: each fault with its place and its reason; all are counted, the first are shown."""

from collections import Counter
from typing import Literal

from qlora_lowmem.errors import UsageError

FaultKind = Literal[
    "encoding",
    "not JSON",
    "too long",
    "not an object",
    "wrong keys",
    "wrong type",
    "empty",
    "messages",
    "tools",
    "nothing to learn",
    "mixed formats",
    "chat template",
]
FAULTS_SHOWN = 20


class FaultySampleError(Exception):
    """A line or row that is no sample. The message goes on after its place."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class FaultLog:
    """Faults as they are found, of one file or data set.

    Args:
        name: the file's path or the data set's id.
        unit: what is numbered: `line` or `row`.
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name = name
        self._unit = unit
        self._counts: Counter[str] = Counter()
        self._shown: list[str] = []

    def add(self, number: int, fault: FaultySampleError) -> None:
        """A fault of line or row `number`, from 1."""
        self._counts[fault.kind] += 1
        if len(self._shown) < FAULTS_SHOWN:
            place = f"{self._name}:{number}" if self._unit == "line" else f"{self._name}, {self._unit} {number}"
            self._shown.append(f"{place}: {fault}")

    def refuse_if_any(self, seen: int) -> None:
        """End here if there were faults among `seen` lines or rows.

        Raises:
            UsageError: counts by reason, then the first faults.
        """
        total = self._counts.total()
        if not total:
            return
        by_reason = ", ".join(f"{count} {kind}" for kind, count in self._counts.most_common())
        count = "1 fault" if total == 1 else f"{total} faults"
        head = f"{self._name}: {count} in {seen} {self._unit}s ({by_reason}); correct the data and start again"
        more = [f"... and {total - len(self._shown)} more"] if total > len(self._shown) else []
        raise UsageError("\n  ".join([head, *self._shown, *more]))
