"""What a reader yields: one row a line of JSON Lines or a row of a table, sound or not."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from qlora_lowmem.data.faults import FaultySampleError


class Row(NamedTuple):
    """A line or row, numbered from 1.

    Attributes:
        number: its line or row.
        size: what it advances a progress bar: bytes of a line, 1 for a row.
        value: the object on it; None for a blank line or a fault.
        fault: why there is no object.
    """

    number: int
    size: int
    value: dict[str, Any] | None
    fault: FaultySampleError | None = None


class Reader(Protocol):
    """A source, opened.

    Attributes:
        total: all sizes together.
        byte_order_mark: whether the file starts with one; known once the first row was read.
        unused_columns: columns of a table that no format has.
    """

    total: int
    byte_order_mark: bool
    unused_columns: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """Every row in order. Memory does not grow with their number."""
        ...
