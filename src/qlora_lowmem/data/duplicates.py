"""How many samples repeat an earlier one, in memory that does not grow with their number."""

import hashlib
import tempfile
from array import array
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# Digests of one pass: 4 MiB, and twice that for sorting them.
PASS_SAMPLES = 2**18
_BUFFERED = 2**15


@dataclass(frozen=True)
class Duplicates:
    """Samples that repeat an earlier one.

    Attributes:
        count: how many.
        first: (line or row of the first of them, that of the sample it repeats); None if there is none.
    """

    count: int
    first: tuple[int, int] | None


class DuplicateCounter:
    """Counts repeats over any number of samples.

    Each sample leaves 16 bytes in a temporary file: a 64-bit digest and its number. `count` sorts the digests in as
    many passes over the file as keep about `PASS_SAMPLES` of them in memory at once. Among n samples, n^2 / 2^65
    pairs are expected to share a digest by chance: 10^-5 for twenty million.
    """

    def __init__(self, pass_samples: int = PASS_SAMPLES) -> None:
        self._pass_samples = pass_samples
        self._file = tempfile.TemporaryFile(prefix="qlora_lowmem-")  # noqa: SIM115 - closed by __exit__
        self._buffer = array("Q")
        self._samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

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
