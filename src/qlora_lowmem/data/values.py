"""What a reader yields, the texts and JSON values in it, and what is wrong with them, with place and reason."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, NoReturn

from qlora_lowmem.errors import UsageError

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
    bytes: "bytes",
}


def kind_of(value: Any) -> str:
    """What a value is, as JSON names it; a table may hold more than JSON does."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def is_nothing(value: Any) -> bool:
    """Whether a list that need not be there is not: null, or empty, as a list or as the text that tables hold."""
    return value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "null", "[]"))


def check_kind(fault: "FaultKind", place: str, value: Any, kind: type, instead: str) -> None:
    """Raise a `FaultySampleError` unless `value` at `place` is of a kind; `instead` says which, and what to write."""
    if not isinstance(value, kind):
        raise FaultySampleError(fault, f"{place} is {kind_of(value)}, not {instead}")


def check_text(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    """Raise a `FaultySampleError` unless `value` is a text that says something, whole in UTF-8."""
    check_kind("wrong type", repr(name), value, str, "text; write it as text")
    if not may_be_empty and not value.strip():
        raise FaultySampleError("empty", f"{name!r} is empty; write it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as half:
        fault = f"{name!r} holds half a surrogate pair at {half.start + 1}; write the character whole"
        raise FaultySampleError("encoding", fault) from None


def check_json(name: str, value: Any) -> None:
    """Raise a `FaultySampleError` unless `value` can be JSON in UTF-8, which templates write tools and arguments as."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        fault = f"{name!r} holds half a surrogate pair; write the character whole"
        raise FaultySampleError("encoding", fault) from None
    except RecursionError:
        raise FaultySampleError("tools", f"{name!r} is nested too deeply; write it flatter") from None
    except TypeError:
        raise FaultySampleError("wrong type", f"{name!r} holds what is not JSON; write texts and numbers") from None


def parse_json(name: str, text: str) -> Any:
    """The value that `text` writes as JSON, or a `FaultySampleError`."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise FaultySampleError("tools", f"{name!r} is text that is not JSON; write the object itself") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


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
    """Faults as they are found, of the file or data set `name`, whose `unit` (`line` or `row`) is numbered."""

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
        """A `UsageError` if there were any among `seen` lines or rows: counts by reason, then the first faults."""
        total = self._counts.total()
        if not total:
            return
        by_reason = ", ".join(f"{count} {kind}" for kind, count in self._counts.most_common())
        count = "1 fault" if total == 1 else f"{total} faults"
        head = f"{self._name}: {count} in {seen} {self._unit}s ({by_reason}); correct the data and start again"
        more = [f"... and {total - len(self._shown)} more"] if total > len(self._shown) else []
        raise UsageError("\n  ".join([head, *self._shown, *more]))


class Row(NamedTuple):
    """A line or row, numbered from 1.

    Attributes:
        size: what it advances a progress bar: bytes of a line, 1 for a row.
        value: the object on it, or why there is none; None for a blank line.
    """

    number: int
    size: int
    value: dict[str, Any] | FaultySampleError | None


class Reader(ABC):
    """A source, opened.

    Attributes:
        total: all sizes together.
        byte_order_mark: whether the file starts with one; known once the first row was read.
        unused_columns: columns of a table that no format has.
    """

    total: int
    byte_order_mark = False
    unused_columns: tuple[str, ...] = ()

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Every row in order. Memory does not grow with their number.

        Raises:
            UsageError: the source cannot be read, or is damaged.
        """
