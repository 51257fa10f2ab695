"""Fields of a JSON file, each checked as it is taken: what is missing or strange is named by its place in the file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qlora_lowmem.errors import UsageError
from qlora_lowmem.results.parts import Provenance

_Kind = TypeVar("_Kind")
_LARGEST = 2**60  # bytes, tokens or whatever is counted: no card and no run has more
# What neither HTML nor SVG may hold (XML 1.0, "Char"), and what would turn a line of text round.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


class NoObjectError(UsageError):
    """JSON that is a list or a value of its own: no result of this project's that a page shows."""


class Fields:
    """A JSON object that knows where it stands.

    Every way to take a field raises ValueError with its place if it is missing or of another kind than asked for.

    Attributes:
        raw: the object itself.
    """

    def __init__(self, content: Mapping[str, Any], place: str = "") -> None:
        self.raw = content
        self._place = place

    def __getitem__(self, name: str) -> Any:
        if name not in self.raw:
            raise ValueError(f"{self._place}{name} is missing")
        return self.raw[name]

    def text(self, name: str) -> str:
        """A string."""
        return self._take(name, str, "a text")

    def flag(self, name: str) -> bool:
        """True or false."""
        return self._take(name, bool, "true or false")

    def count(self, name: str) -> int:
        """A whole number of 0 or more."""
        value = self._take(name, int, "a whole number")
        if isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise ValueError(f"{self._place}{name}: {str(value)[:40]} is not a whole number from 0 to 2^60")
        return value

    def object(self, name: str) -> "Fields":
        """An object."""
        return Fields(self._take(name, dict, "an object"), f"{self._place}{name}.")

    def objects(self, name: str) -> list["Fields"]:
        """A list of at least one object."""
        found = self._take(name, list, "a list")
        if not found or any(not isinstance(item, dict) for item in found):
            raise ValueError(f"{self._place}{name} is not a list of at least one object")
        return [Fields(item, f"{self._place}{name}[{index}].") for index, item in enumerate(found)]

    def counts(self) -> dict[str, int]:
        """The whole object as counts by name."""
        return {name: self.count(name) for name in self.raw}

    def _take(self, name: str, kind: type[_Kind], words: str) -> _Kind:
        value = self[name]
        if not isinstance(value, kind):
            raise ValueError(f"{self._place}{name}: {value!r} is not {words}")  # noqa: TRY004
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with what no page can show replaced in its texts.

    Raises:
        NoObjectError: the file holds something else than an object.
        UsageError: it cannot be read or is not JSON.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a file that a command of this project wrote") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); write it again with the command that made it") from None
    if not isinstance(content, dict):
        raise NoObjectError(f"{path} holds no object; give a file that a command of this project wrote")
    found: dict[str, Any] = _printable(content)
    return found


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


def provenance_of(content: Fields) -> Provenance:
    """The provenance record of a file's `environment`.

    Raises:
        ValueError: it is missing or incomplete.
    """
    record = content.object("environment")
    versions = record.object("versions")
    return Provenance(
        provenance=record.text("provenance"),
        device=record.text("device"),
        driver=record.text("driver"),
        versions={name: versions.text(name) for name in versions.raw},
        commit=record.text("commit"),
        command=record.text("command"),
        date=record.text("date"),
    )
