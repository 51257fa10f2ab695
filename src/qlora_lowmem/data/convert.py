"""Files of other kinds and keys, written as JSON Lines that a recipe's `data` reads: `qlora-lowmem data convert`."""

import csv
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qlora_lowmem.data.check import Walk
from qlora_lowmem.data.sources import LINE_LIMIT, JsonLines, no_constant, object_once
from qlora_lowmem.data.tables import check_once, values_of
from qlora_lowmem.data.values import FaultySampleError, Row
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import read_text, write_whole
from qlora_lowmem.units import GIB, MIB

CONVERTED_SUFFIXES = (".json", ".csv", ".tsv", ".jsonl", ".parquet")

_WHOLE = 4 * GIB  # of a JSON file, which takes several times as much in memory

Value = dict[str, Any] | FaultySampleError


@dataclass(frozen=True)
class Converted:
    """How many samples were written, what was read as ours (a sentence each), and the keys that were left out."""

    samples: int
    read_as: tuple[str, ...]
    unread: tuple[str, ...]


def convert(source: Path, target: Path, keys: Mapping[str, str]) -> Converted:
    """Write the samples of `source` to `target` as JSON Lines, each checked, whole or not at all.

    A JSON file holds an array of samples, or an object with one such array, and is read whole into memory; the others
    are read a row at a time. The first line of a CSV or TSV file has the names of its columns.

    Args:
        keys: our key -> the key or column that holds it; empty where the keys are known.

    Raises:
        UsageError: it cannot be read, holds no sample, or every fault with its row.
    """
    if source.suffix.lower() not in CONVERTED_SUFFIXES:
        raise UsageError(
            f"{str(source)!r} cannot be converted; allowed: {', '.join(CONVERTED_SUFFIXES)}. Export it as one"
        )
    try:
        regular = stat.S_ISREG(source.stat().st_mode)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from None
    if not regular:
        raise UsageError(f"{str(source)!r} is no regular file; give one of {', '.join(CONVERTED_SUFFIXES)}")
    walk = Walk(str(source), "row", "all")
    try:
        write_whole(target, _lines(source, keys, walk))
    except OSError as error:
        raise UsageError(f"{str(target)!r} cannot be written ({error.strerror or error}); give another file") from None
    return Converted(walk.sound, tuple(walk.said), tuple(walk.unread))


def _lines(source: Path, keys: Mapping[str, str], walk: Walk) -> Iterator[str]:
    values = (_taken(value, keys) if keys else value for value in _values(source))
    for _, sample in walk.samples(Row(number, 1, value) for number, value in enumerate(values, start=1)):
        yield json.dumps(sample, ensure_ascii=False) + "\n"
    if not walk.sound:
        raise UsageError(f"{str(source)!r} holds no samples, so nothing is written")


def _taken(value: Value, keys: Mapping[str, str]) -> Value:
    if isinstance(value, FaultySampleError):
        return value
    absent = [theirs for theirs in keys.values() if theirs not in value]
    if absent:
        return FaultySampleError("wrong keys", f"has no {absent[0]!r}; it has {', '.join(map(repr, value))}")
    return {ours: value[theirs] for ours, theirs in keys.items()}


def _values(source: Path) -> Iterator[Value]:
    suffix = source.suffix.lower()
    try:
        if suffix == ".json":
            yield from _array_of(source)
        elif suffix in (".csv", ".tsv"):
            with source.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(_lines_of(file), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
                check_once(str(source), reader.fieldnames or ())
                yield from map(_cells, reader)
        elif suffix == ".jsonl":
            yield from (row.value for row in JsonLines(str(source)).rows() if row.value is not None)
        else:
            from pyarrow.parquet import ParquetFile

            table = ParquetFile(source)
            check_once(str(source), table.schema_arrow.names)
            for batch in table.iter_batches():
                yield from values_of(batch)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's are ValueErrors
        raise _unreadable(source, error) from None


def _lines_of(file: TextIO) -> Iterator[str]:
    """The lines of a table of text, none of them without an end."""
    csv.field_size_limit(LINE_LIMIT)
    while line := file.readline(LINE_LIMIT):
        if len(line) == LINE_LIMIT:
            raise csv.Error(f"a line is longer than {LINE_LIMIT // MIB} MiB")
        yield line


def _cells(row: dict[str, Any]) -> Value:
    """A row of a table of text, which has as many cells as columns."""
    if None in row or None in row.values():  # as csv has those too many, and those too few
        return FaultySampleError(
            "wrong keys", "has more or fewer cells than the first line names; quote what holds commas"
        )
    return row


def _unreadable(source: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
    return UsageError(f"{str(source)!r} cannot be read ({reason}); write it again, as UTF-8")


def _array_of(source: Path) -> list[Value]:
    try:
        content = json.loads(read_text(source, _WHOLE), parse_constant=no_constant, object_pairs_hook=object_once)
    except FaultySampleError as fault:
        raise UsageError(f"{str(source)!r} {fault}") from None
    except RecursionError:
        raise UsageError(f"{str(source)!r} is nested too deeply; write an array of flat objects") from None
    arrays = [each for each in (content.values() if isinstance(content, dict) else [content]) if isinstance(each, list)]
    if len(arrays) != 1:
        raise UsageError(
            f"{str(source)!r} holds {len(arrays)} arrays where one of samples is looked for; write that one alone"
        )
    return [
        each if isinstance(each, dict) else FaultySampleError("not an object", "is no object, so no sample")
        for each in arrays[0]
    ]
