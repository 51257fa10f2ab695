"""Tokenised samples on disk: written once, one sample at a time, and memory-mapped from there."""

import errno
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import read_json, whole_folder
from qlora_lowmem.tokens.encoding import NO_LOSS, Encoded

TOKENS_FILE = "tokens.arrow"
REPORT_FILE = "report.json"
# A record batch: 4 MiB of ids and as much of labels. Reading keeps about 2 KiB of memory for each.
_BATCH_TOKENS = 2**20
# Templates put a line break or two after the token that ends a turn.
_TAIL = 4
_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class TokenReport:
    """What tokenising came to.

    Attributes:
        samples, of_samples: that are trained on, and that there are: a run of few steps tokenises those that it sees.
        tokens: kept, over all samples.
        scored_tokens: those with a loss.
        longest: tokens of the longest sample before anything was cut.
        truncated_samples, truncated_tokens: samples longer than `max_seq_length`, and the tokens cut from their ends.
        first_truncated: line or row of the first of them.
        dropped_samples: samples left out, for all their tokens with a loss were cut.
        ending_samples: samples whose last tokens with a loss hold one at which the model stops.
        largest_id: of all tokens that are kept.
    """

    samples: int
    of_samples: int
    tokens: int
    scored_tokens: int
    longest: int
    truncated_samples: int
    truncated_tokens: int
    first_truncated: int | None
    dropped_samples: int
    ending_samples: int = 0
    largest_id: int = field(default=0, compare=False)

    def lines(self, max_seq_length: int, unit: str) -> Iterator[str]:
        """What a person should know, in sentences."""
        seen = self.samples + self.dropped_samples
        part = f" of {self.of_samples:,}: the ones that this run sees" if seen < self.of_samples else ""
        yield (
            f"{self.tokens:,} tokens, {self.scored_tokens:,} of them with a loss, in {self.samples:,} samples{part}; "
            f"the longest has {self.longest:,}"
        )
        if self.truncated_samples:
            yield (
                f"note: {self.truncated_samples:,} samples are longer than max_seq_length {max_seq_length:,} and lose "
                f"{self.truncated_tokens:,} tokens at their ends (first {unit} {self.first_truncated}); raise "
                "max_seq_length, or split them"
            )
        if self.dropped_samples:
            yield (
                f"note: {self.dropped_samples:,} samples are left out: all that they would teach lies beyond "
                f"max_seq_length {max_seq_length:,}"
            )
        if self.samples > self.truncated_samples and not self.ending_samples:
            yield (
                "note: no sample has a loss on a token at which the model stops, so it may not learn to stop; end the "
                "answers with the end token, or use a chat template that does"
            )


_COUNTED = [each.name for each in fields(TokenReport) if each.name not in ("of_samples", "first_truncated")]


class TokenTally:
    """Cuts samples to their longest length and counts what that does."""

    def __init__(self, max_seq_length: int, ends: Collection[int] = ()) -> None:
        self._limit = max_seq_length
        self._ends = ends
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._first_truncated: int | None = None

    def cut(self, samples: Iterable[tuple[int, Encoded]]) -> Iterator[Encoded]:
        """Every sample that still teaches something, cut. Samples come with their line or row."""
        counts = self._counts
        for number, (ids, labels) in samples:
            counts["longest"] = max(counts["longest"], len(ids))
            over = len(ids) - self._limit
            if over > 0:
                counts["truncated_samples"] += 1
                counts["truncated_tokens"] += over
                self._first_truncated = self._first_truncated or number
                ids, labels = ids[: self._limit], labels[: self._limit]
            scored = len(labels) - labels.count(NO_LOSS)
            counts["samples" if scored else "dropped_samples"] += 1
            if scored:
                counts["tokens"] += len(ids)
                counts["scored_tokens"] += scored
                counts["largest_id"] = max(counts["largest_id"], *ids)
                counts["ending_samples"] += any(label in self._ends for label in labels[-_TAIL:])
                yield Encoded(ids, labels)

    def report(self, of_samples: int) -> TokenReport:
        """The counts so far, of a source of `of_samples`."""
        return TokenReport(of_samples=of_samples, first_truncated=self._first_truncated, **self._counts)


def write_tokens(folder: Path, samples: Iterable[tuple[int, Encoded]], tally: TokenTally, of_samples: int) -> None:
    """Write samples and their report to `folder`, which appears whole or, with a `UsageError`, not at all."""
    try:
        with whole_folder(folder, fsync=True) as scratch:
            with pa.OSFile(str(scratch / TOKENS_FILE), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
                for batch in _batches(tally.cut(samples)):
                    writer.write_batch(batch)
            report = asdict(tally.report(of_samples))
            content = {"report": report, "sha256": _digest(scratch, report)}
            (scratch / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise UsageError(
            f"run.output_dir: the tokenised data cannot be written to {str(folder)!r} ({error.strerror or error}); "
            + ("make room: they need 8 bytes a token" if full else "give another folder with --output-dir")
        ) from None


def are_whole(folder: Path) -> bool:
    """Whether the tokens in a folder are to the bit what `write_tokens` wrote; reads them all."""
    try:
        content = read_json(folder / REPORT_FILE)
        return bool(content["sha256"] == _digest(folder, content["report"]))
    except (OSError, KeyError, TypeError):
        return False


def open_tokens(folder: Path) -> tuple[Dataset, TokenReport]:
    """What `write_tokens` wrote: columns `input_ids` and `labels`, memory-mapped."""
    content = read_json(folder / REPORT_FILE)
    return Dataset.from_file(str(folder / TOKENS_FILE)), TokenReport(**content["report"])


def _digest(folder: Path, report: dict[str, Any]) -> str:
    """SHA-256 of the tokens and of their report."""
    with (folder / TOKENS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(report).encode())
    return digest.hexdigest()


def _batches(samples: Iterable[Encoded]) -> Iterator[pa.RecordBatch]:
    columns: tuple[list[Any], list[Any]] = ([], [])
    held = 0
    for sample in samples:
        for column, values in zip(columns, sample, strict=True):
            column.append(np.asarray(values, dtype=np.int32))
        held += len(sample.ids)
        if held >= _BATCH_TOKENS:
            yield _batch(columns)
            columns, held = ([], []), 0
    if held:
        yield _batch(columns)


def _batch(columns: tuple[list[Any], list[Any]]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in columns[0]])]).astype(np.int32)
    lists = [pa.ListArray.from_arrays(offsets, np.concatenate(column)) for column in columns]
    return pa.RecordBatch.from_arrays(lists, schema=_SCHEMA)
