"""Every sample of a source, checked, in memory that does not grow with it."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.data.foreign import as_ours
from qlora_lowmem.data.formats import FORMATS, REASONING, TrainOn, check_sample, format_of_kind
from qlora_lowmem.data.report import DataReport, DuplicateCounter
from qlora_lowmem.data.sources import DataSource, JsonLines, resolve_data
from qlora_lowmem.data.tables import ParquetTable, open_hub
from qlora_lowmem.data.values import FaultLog, FaultySampleError, Reader, Row
from qlora_lowmem.errors import UsageError

# A control character as json.dumps escapes it, after an even number of backslashes: all but tab and line breaks.
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\(?:[bf]|u00(?:0[0-8be]|0f|1[0-9a-f]))|\x7f")
_CONTROL_MARKS = ("\\u00", "\\b", "\\f", "\x7f")
_REPLACEMENT = "\ufffd"
_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class CheckedData:
    """A source whose every sample is sound, and what it holds; `quiet` says that no progress bar is wanted."""

    source: DataSource
    train_on: TrainOn
    report: DataReport
    quiet: bool = True

    def samples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every sample with its line or row, checked again (`UsageError`): a file may have changed since."""
        yield from Walk(self.source.shown, self.source.unit, self.train_on).samples(_open(self.source).rows())


def check_data(name: str, train_on: TrainOn = "completions", *, quiet: bool = True) -> CheckedData:
    """Read all of a recipe's `data` once and check each sample.

    With `train_on="completions"`, a sample of `messages` needs an assistant's message to learn from.

    Args:
        name: a `.jsonl` or `.parquet` file, or a hub id with an optional split (`owner/name:split`).
        quiet: show no progress bar, which otherwise appears after two seconds.

    Raises:
        UsageError: it cannot be read or holds no sample; or every fault with its line or row, 20 shown and all counted.
    """
    from tqdm.auto import tqdm

    source = resolve_data(name)
    reader = _open(source)
    per_byte = source.kind == "jsonl"
    with (
        tempfile.TemporaryFile(prefix="qlora_lowmem-") as scratch,
        tqdm(
            total=reader.total,
            desc=f"checking {source.shown}",
            unit="B" if per_byte else "row",
            unit_scale=True,
            delay=_PATIENCE_SECONDS,
            disable=quiet,
        ) as bar,
    ):
        walk = Walk(source.shown, source.unit, train_on, advance=bar.update)
        duplicates = DuplicateCounter(scratch)
        replaced = controls = tools = calls = 0
        reasoning: set[str] = set()
        for number, sample in walk.samples(reader.rows()):
            text = json.dumps(sample, sort_keys=True, ensure_ascii=False)
            duplicates.add(number, text.encode())
            replaced += _REPLACEMENT in text
            # Where none of these stands, which is nearly everywhere, the expression need not run.
            controls += any(mark in text for mark in _CONTROL_MARKS) and _CONTROL.search(text) is not None
            tools += "tools" in sample
            lists = (sample.get(key) for key in ("messages", "prompt", "completion"))
            messages = [message for each in lists if isinstance(each, list) for message in each]
            calls += any("tool_calls" in message for message in messages)
            reasoning.update(key for message in messages for key in REASONING if key in message)
        if walk.first is None:
            blank = ", all blank" if walk.rows else ""
            write = f"; write one JSON object a line: {FORMATS}" if per_byte else ""
            raise UsageError(f"{source.shown}: no samples ({walk.rows} {source.unit}s{blank}){write}")
        kind, _ = walk.first
        report = DataReport(
            name=source.shown,
            unit=source.unit,
            format=format_of_kind(kind),
            conversational="messages" in kind,
            samples=walk.sound,
            blank_lines=walk.blank,
            duplicates=duplicates.count(),
            byte_order_mark=reader.byte_order_mark,
            replacement_characters=replaced,
            control_characters=controls,
            with_tools=tools,
            with_tool_calls=calls,
            unused_columns=(*reader.unused_columns, *walk.unread),
            read_as=tuple(walk.said),
            reasoning_keys=tuple(key for key in REASONING if key in reasoning),
        )
    return CheckedData(source, train_on, report, quiet)


def _open(source: DataSource) -> Reader:
    if source.kind == "jsonl":
        return JsonLines(source.name)
    if source.kind == "parquet":
        return ParquetTable(source.name)
    return open_hub(source.name, source.split)


class Walk:
    """One pass over a source's rows; `advance` is told the size of each.

    Attributes:
        rows, blank, sound: how many were seen, had nothing on them, held a sample.
        first: what the first sample holds, as `check_sample` names it, and its line or row.
        said, unread: what was read as ours and what was left unread, in the order in which it was met.
    """

    def __init__(
        self, name: str, unit: str, train_on: TrainOn, advance: Callable[[int], object] = lambda _size: None
    ) -> None:
        self._name, self._unit, self._train_on, self._advance = name, unit, train_on, advance
        self.rows = self.blank = self.sound = 0
        self.first: tuple[str, int] | None = None
        self.said: dict[str, None] = {}
        self.unread: dict[str, None] = {}

    def samples(self, rows: Iterable[Row]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each sound sample with its line or row; after the last, a `UsageError` if there were faults."""
        faults = FaultLog(self._name, self._unit)
        for row in rows:
            self.rows = row.number
            self._advance(row.size)
            if row.value is None:
                self.blank += 1
                continue
            try:
                sample = self._check(row.number, row.value)
            except FaultySampleError as fault:
                faults.add(row.number, fault)
            else:
                self.sound += 1
                yield row.number, sample
        faults.refuse_if_any(self.rows)

    def _check(self, number: int, value: dict[str, Any] | FaultySampleError) -> dict[str, Any]:
        if isinstance(value, FaultySampleError):
            raise value
        sample, kind = check_sample(as_ours(value, self.said.setdefault, self.unread.setdefault), self._train_on)
        self.first = self.first or (kind, number)
        if kind != self.first[0]:
            before = f"{self._unit} {self.first[1]} holds {self.first[0]}"
            raise FaultySampleError("mixed formats", f"holds {kind}, but {before}; use one format a file")
        return sample
