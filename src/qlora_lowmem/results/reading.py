"""The border to JSON: a file's object as a frozen dataclass, or what is wrong with it and where."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import Count, read_small
from qlora_lowmem.memory.profile import PHASES, Peak

_Type = TypeVar("_Type")
Rows = Annotated[tuple[_Type, ...], msgspec.Meta(min_length=1)]
_NAME = re.compile(r"\[\d+\]\.name$")  # of a phase, which tells it from the others of its list
_WORDS = {
    "int": (int, "a whole number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "object": (dict, "an object"),
    "array": (list, "a list"),
}
_PEAK = [field.name for field in fields(Peak)]
# What neither HTML nor SVG may hold (XML 1.0, "Char"), and what would turn a line of text round.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def one_of(names: Iterable[str]) -> msgspec.Meta:
    """Of a text that is one of those; the names are words."""
    return msgspec.Meta(pattern=f"^({'|'.join(names)})$")


@dataclass(frozen=True)
class PhasePeak:
    """A phase with its peak, in bytes, and its launches, as `MemoryProfile.to_dict` lists them."""

    name: Annotated[str, one_of(PHASES)]
    allocated: Count
    reserved: Count
    device: Count
    launches: Count | None = None


@dataclass(frozen=True)
class Cases(Generic[_Type]):
    """A file whose rows are its `cases`, one at least."""

    cases: Rows[_Type]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, with what no page can show replaced in its texts; None if it holds something else.

    Raises:
        UsageError: it cannot be read or is not JSON.
    """
    try:
        content = json.loads(read_small(path), parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a file that a command of this project wrote") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); write it again with the command that made it") from None
    return _printable(content) if isinstance(content, dict) else None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return _FORBIDDEN.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return value


def read_as(kind: type[_Type], content: Mapping[str, Any]) -> _Type:
    """The object as a dataclass, where a row's `peak_*_bytes` are its `peak`; other fields may be there.

    Raises:
        ValueError: `PLACE is missing`, or `PLACE: VALUE is not` what it should be.
    """
    try:
        return msgspec.convert(_with_peaks(content), kind)
    except msgspec.ValidationError as error:
        raise ValueError(_in_words(str(error), content)) from None


def _with_peaks(value: Any) -> Any:
    """The inverse of `tables.plain_row`, wherever a row stands."""
    if isinstance(value, list):
        return [_with_peaks(item) for item in value]
    if not isinstance(value, dict):
        return value
    peak = {name: value.get(f"peak_{name}_bytes") for name in _PEAK}
    found = {name: _with_peaks(item) for name, item in value.items()}
    return found | {"peak": peak} if any(f"peak_{name}_bytes" in value for name in _PEAK) else found


def _in_words(fault: str, content: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.cases[0].tokens`", with the value that stands there."""
    why, _, path = fault.partition(" - at `$")
    place = re.sub(r"\.peak\.(\w+)", r".peak_\1_bytes", path.rstrip("`"))
    if absent := re.search("required field `(.+)`", why):
        place += f".{absent[1]}"
    place, found = place.removeprefix("."), content
    for part in re.findall(r"[^.\[\]]+", place):
        if isinstance(found, dict) and part not in found:
            return f"{place} is missing"
        found = found[int(part)] if isinstance(found, list) else found[part]
    if "length" in why:
        return f"{place} is not a list of at least one object"
    if choices := re.search(r"\^\((.+)\)\$", why):
        return f"{_NAME.sub('', place)}: {found!r:.40} is not one of {choices[1].replace('|', ', ')}"
    if expected := re.match(r"Expected `(\w+)", why):
        kind, words = _WORDS[expected[1]]
        if place.endswith("[...]"):
            name, found = next((name, value) for name, value in found.items() if type(value) is not kind)
            place = place.replace("[...]", f".{name}")
        return f"{place}: {found!r:.40} is not {words}{' from 0 to 2^60' if '=' in why else ''}"
    return f"{place}: {why}"
