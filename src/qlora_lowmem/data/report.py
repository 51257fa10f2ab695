"""What checked data hold, as counts by reason: for people, and for `--json`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qlora_lowmem.data.duplicates import Duplicates
from qlora_lowmem.data.formats import DataFormat


@dataclass(frozen=True)
class DataReport:
    """What a file or a data set holds.

    Attributes:
        name: the file's path or the hub id with its split.
        unit: what is numbered: `line` or `row`.
        format: of every sample.
        conversational: whether samples are messages, which need a chat template.
        samples: how many.
        blank_lines: lines skipped, for there is nothing on them.
        duplicates: samples that repeat an earlier one; they are kept.
        byte_order_mark: whether the file starts with one.
        replacement_characters: samples with U+FFFD, which an earlier program left where it could not decode.
        control_characters: samples with characters that belong in no text, a NUL for instance.
        with_tools: samples that bring tools.
        with_tool_calls: samples in which the assistant calls one.
        unused_columns: columns of a table that the format does not have.
    """

    name: str
    unit: str
    format: DataFormat
    conversational: bool
    samples: int
    blank_lines: int
    duplicates: Duplicates
    byte_order_mark: bool
    replacement_characters: int
    control_characters: int
    with_tools: int
    with_tool_calls: int
    unused_columns: tuple[str, ...]

    @property
    def line(self) -> str:
        """All of it in a few words."""
        tools = f", {self.with_tools:,} with tools" if self.with_tools else ""
        return f"{self.samples:,} samples of {self.format} in {self.name}{tools}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know though it stops nothing."""
        return tuple(f"{self.name}: {note}" for note in self._notes())

    def _notes(self) -> Iterator[str]:
        found = self.duplicates
        if found.first is not None:
            where = f"first {self.unit} {found.first[0]}, which repeats {self.unit} {found.first[1]}"
            yield f"{found.count:,} of {self.samples:,} samples repeat an earlier one ({where}); they count twice"
        if self.blank_lines:
            yield f"{self.blank_lines:,} blank lines skipped"
        if self.byte_order_mark:
            yield "starts with a byte order mark, ignored; save it as UTF-8 without one"
        if self.replacement_characters:
            yield (
                f"{self.replacement_characters:,} samples hold U+FFFD, the mark of a text decoded wrongly before it "
                "came here; write them again from their source"
            )
        if self.control_characters:
            yield f"{self.control_characters:,} samples hold control characters; the model would learn them"
        if self.unused_columns:
            yield f"columns that are not read: {', '.join(self.unused_columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)
