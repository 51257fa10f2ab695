"""What a source holds, repeats of earlier samples counted in memory that does not grow with their number."""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from qlora_lowmem.data.formats import DataFormat

# Digests of one pass: 4 MiB, and twice that for sorting them.
PASS_SAMPLES = 2**18
_BUFFERED = 2**15


@dataclass(frozen=True)
class Duplicates:
    """How many samples repeat an earlier one, and (line or row of the first of them, that of the one it repeats)."""

    count: int
    first: tuple[int, int] | None


class DuplicateCounter:
    """Counts repeats over any number of samples.

    Each sample leaves 16 bytes in `file`, a temporary one: a 64-bit digest and its number. `count` sorts the digests in
    as many passes over the file as keep about `PASS_SAMPLES` of them in memory at once. Among n samples, n^2 / 2^65
    pairs are expected to share a digest by chance: 10^-5 for twenty million.
    """

    def __init__(self, file: IO[bytes], pass_samples: int = PASS_SAMPLES) -> None:
        self._file = file
        self._pass_samples = pass_samples
        self._buffer = array("Q")
        self._samples = 0

    def add(self, number: int, content: bytes) -> None:
        """The sample of line or row `number`, written the same way wherever it occurs."""
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self._buffer.extend((int.from_bytes(digest, "little"), number))
        self._samples += 1
        if len(self._buffer) >= 2 * _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        self._buffer.tofile(self._file)
        del self._buffer[:]

    def count(self) -> Duplicates:
        """All repeats so far."""
        import numpy as np

        self._flush()
        passes = -(-self._samples // self._pass_samples)
        total, first = 0, None
        for part in range(passes):
            chosen = []
            self._file.seek(0)
            while block := self._file.read(16 * _BUFFERED):
                pairs = np.frombuffer(block, dtype=np.uint64).reshape(-1, 2)
                chosen.append(pairs[pairs[:, 0] % passes == part])
            # Stable, so that of equal digests the earlier sample comes first.
            pairs = np.concatenate(chosen)
            pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
            repeats = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
            total += len(repeats)
            if len(repeats):
                earliest = repeats[np.argmin(pairs[repeats + 1, 1])]
                found = (int(pairs[earliest + 1, 1]), int(pairs[earliest, 1]))
                first = min(first, found) if first else found
        return Duplicates(total, first)


@dataclass(frozen=True)
class DataReport:
    """What a file or a data set holds.

    Attributes:
        name: the file's path or the hub id with its split.
        unit: what is numbered: `line` or `row`.
        format: of every sample.
        conversational: whether samples are messages, which need a chat template.
        blank_lines: lines skipped, for there is nothing on them.
        duplicates: samples that repeat an earlier one; they are kept.
        replacement_characters: samples with U+FFFD, which an earlier program left where it could not decode.
        control_characters: samples with characters that belong in no text, a NUL for instance.
        with_tools, with_tool_calls: samples that bring tools, and in which the assistant calls one.
        unused_columns: columns of a table that the format does not have, and keys beside complete samples.
        read_as: what of other programs' formats was read as ours, a sentence each.
        reasoning_keys: the keys under which messages bring an assistant's reasoning.
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
    read_as: tuple[str, ...] = ()
    reasoning_keys: tuple[str, ...] = ()

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
        yield from self.read_as
        if self.unused_columns:
            yield f"{'keys' if self.unit == 'line' else 'columns'} that are not read: {', '.join(self.unused_columns)}"
