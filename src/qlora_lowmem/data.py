"""Training data in JSON Lines, checked line by line before any model loads.

One object a line, all of one format:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          (or two lists of messages)
    {"text": "..."}
"""

import codecs
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from .errors import UsageError

DataFormat = Literal["messages", "prompt/completion", "text"]

FAULTS_SHOWN = 20
_KEYS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
_ROLES = ("system", "user", "assistant", "tool")
_FORMATS = 'one of {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class DataReport:
    """What a data file holds."""

    path: str
    format: DataFormat
    count: int
    blank_lines: int
    duplicates: int
    byte_order_mark: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know though it stops nothing."""
        notes = []
        if self.duplicates:
            notes.append(
                f"{self.path}: {self.duplicates} of {self.count} samples repeat an earlier one; they count twice"
            )
        if self.blank_lines:
            notes.append(f"{self.path}: {self.blank_lines} blank lines skipped")
        if self.byte_order_mark:
            notes.append(f"{self.path}: starts with a byte order mark, ignored; save it as UTF-8 without one")
        return tuple(notes)


@dataclass(frozen=True)
class Samples:
    """A checked file: its report, and its samples as `datasets.Dataset.from_list` takes them."""

    report: DataReport
    samples: list[dict[str, Any]]


class _FaultyLineError(Exception):
    """A line that is no sample, and why."""


def check_data(path: str | os.PathLike[str], train_on: Literal["all", "completions"] = "completions") -> DataReport:
    """The report of a data file.

    Raises:
        UsageError: as `read_samples`.
    """
    return read_samples(path, train_on).report


def read_samples(path: str | os.PathLike[str], train_on: Literal["all", "completions"] = "completions") -> Samples:
    """All samples of a JSON Lines file, each checked.

    With `train_on="completions"`, a sample of `messages` needs an assistant's message to learn from.

    Raises:
        UsageError: the file cannot be read or holds no sample; or every fault with its line, 20 shown and all counted.
    """
    path = Path(path)
    samples: list[dict[str, Any]] = []
    faults: list[str] = []
    seen: set[bytes] = set()
    first: tuple[DataFormat, str, int] | None = None
    blank = lines = 0
    marked = False
    for number, raw in _lines(path):
        lines = number
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            marked, raw = True, raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            blank += 1
            continue
        try:
            sample = _parse(raw, number)
            form = _format_of(sample)
            kind = _check_sample(sample, form, train_on)
            first = first or (form, kind, number)
            _check_one_format(kind, *first[1:])
        except _FaultyLineError as fault:
            faults.append(f"{path}:{number}: {fault}")
            continue
        samples.append(sample)
        seen.add(hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).digest())
    if faults:
        _refuse(path, faults, lines)
    if first is None:
        raise UsageError(f"{path}: no samples ({lines} lines, all blank); write one JSON object a line: {_FORMATS}")
    report = DataReport(str(path), first[0], len(samples), blank, len(samples) - len(seen), marked)
    return Samples(report, samples)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except FileNotFoundError:
        names = sorted(each.name for each in path.parent.glob("*.jsonl"))
        near = difflib.get_close_matches(path.name, names, n=1) or names[:5]
        hint = f"in that folder: {', '.join(near)}" if near else "there is no .jsonl file in that folder"
        raise UsageError(f"{path}: no such data file ({hint}); correct data.data or --data") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; data.data or --data names one .jsonl file in it") from None
    except (OSError, ValueError) as fault:
        raise UsageError(f"{path}: the data file cannot be read: {fault}") from None


def _refuse(path: Path, faults: list[str], lines: int) -> NoReturn:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    shown = faults[:FAULTS_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"... and {len(faults) - len(shown)} more")
    raise UsageError("\n  ".join([f"{path}: {count} in {lines} lines; correct the data and start again", *shown]))


def _parse(raw: bytes, number: int) -> dict[str, Any]:
    """The object on a line, strict JSON: no NaN, no key twice, nothing but UTF-8."""
    if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _FaultyLineError("is UTF-16; save the file as UTF-8")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as fault:
        raise _FaultyLineError(
            f"byte {raw[fault.start]:#04x} at {fault.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as fault:
        raise _FaultyLineError(f"is not JSON: {fault.msg} at column {fault.colno}; {_json_advice(text)}") from None
    except RecursionError:
        raise _FaultyLineError("is nested too deeply; write a flat object") from None
    except ValueError:  # an integer of more digits than Python reads
        raise _FaultyLineError("holds a number that is too long; a sample holds text only") from None
    if not isinstance(value, dict):
        raise _FaultyLineError(f"is {_kind(value)}, not an object; write one object a line: {_FORMATS}")
    return value


def _json_advice(text: str) -> str:
    if text.strip() in ("[", "{"):
        return "a whole sample stands on one line, and no brackets around the lines"
    if text.lstrip().startswith("{'"):
        return "quote with double quotes"
    if text.rstrip().endswith("},"):
        return "no comma between the lines"
    return "write one JSON object a line"


def _no_constant(name: str) -> NoReturn:
    raise _FaultyLineError(f"holds {name}, which is not JSON; a sample holds text only")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FaultyLineError(f"has the key {twice!r} twice; remove one of the two")
    return found


def _format_of(sample: dict[str, Any]) -> DataFormat:
    for form, keys in _KEYS.items():
        if set(sample) == set(keys):
            return form
    known = [key for keys in _KEYS.values() for key in keys]
    present = [key for key in known if key in sample]
    unknown = [key for key in sample if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(repr(key) for key in unknown[:5])
        raise _FaultyLineError(f"has the unknown key {names}{meant}; remove or rename it: a sample is {_FORMATS}")
    if present in (["prompt"], ["completion"]):
        missing = "completion" if present == ["prompt"] else "prompt"
        raise _FaultyLineError(f"has {present[0]!r} but no {missing!r}; add it")
    if not present:
        raise _FaultyLineError(f"is an empty object; a sample is {_FORMATS}")
    raise _FaultyLineError(f"mixes {' and '.join(map(repr, present))}; a sample is {_FORMATS}")


def _check_one_format(kind: str, first_kind: str, first_number: int) -> None:
    if kind != first_kind:
        raise _FaultyLineError(f"holds {kind}, but line {first_number} holds {first_kind}; use one format a file")


def _check_sample(sample: dict[str, Any], form: DataFormat, train_on: str) -> str:
    """What the sample holds, in words: all samples of a file hold the same."""
    if form == "text":
        _check_text("text", sample["text"])
    elif form == "messages":
        roles = _check_messages("messages", sample["messages"])
        if train_on == "completions" and "assistant" not in roles:
            raise _FaultyLineError("has no assistant message, so nothing to learn; add one, or use --train-on all")
    else:
        return _check_pair(sample["prompt"], sample["completion"])
    return form


def _check_pair(prompt: Any, completion: Any) -> str:
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = f"'prompt' is {_kind(prompt)} but 'completion' is {_kind(completion)}"
        raise _FaultyLineError(f"{kinds}; write two texts or two lists of messages")
    if not isinstance(prompt, list):
        _check_text("prompt", prompt)
        _check_text("completion", completion)
        return "prompt/completion texts"
    _check_messages("prompt", prompt)
    if "assistant" not in _check_messages("completion", completion):
        raise _FaultyLineError("'completion' has no assistant message; add the answer to learn")
    return "prompt/completion messages"


def _check_messages(name: str, messages: Any) -> list[str]:
    """The roles of a list of messages, each checked."""
    if not isinstance(messages, list):
        raise _FaultyLineError(f"{name!r} is {_kind(messages)}, not a list of messages; write {_MESSAGE}")
    if not messages:
        raise _FaultyLineError(f"{name!r} is an empty list; write at least one message: {_MESSAGE}")
    for index, message in enumerate(messages):
        place = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise _FaultyLineError(f"{place} is {_kind(message)}, not a message; write {_MESSAGE}")
        for key in ("role", "content"):
            if key not in message:
                raise _FaultyLineError(f"{place} has no {key!r}; write {_MESSAGE}")
        unknown = sorted(set(message) - {"role", "content"})
        if unknown:
            raise _FaultyLineError(
                f"{place} has the unknown key {unknown[0]!r}; remove it: a message is role and content"
            )
        if message["role"] not in _ROLES:
            raise _FaultyLineError(f"{place} has the role {message['role']!r}; allowed: {', '.join(_ROLES)}")
        _check_text(f"{place}.content", message["content"])
    return [message["role"] for message in messages]


_MESSAGE = '[{"role": "user", "content": "..."}]'


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _FaultyLineError(f"{name!r} is {_kind(value)}, not text; put it in quotes")
    if not value.strip():
        raise _FaultyLineError(f"{name!r} is empty; write it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise _FaultyLineError(
            f"{name!r} holds half a surrogate pair at {fault.start + 1}; write the character whole"
        ) from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
