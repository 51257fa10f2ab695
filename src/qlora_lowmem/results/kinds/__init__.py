"""What a kind of result is: how its file is recognised and read, and the section of a page that shows it."""

import dataclasses
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from qlora_lowmem.errors import UsageError
from qlora_lowmem.memory.profile import PHASES, Peak
from qlora_lowmem.results.style import Drawing
from qlora_lowmem.results.tables import Table

_Data = TypeVar("_Data")
_Type = TypeVar("_Type")
_LARGEST = 2**60  # bytes, tokens or whatever is counted: no card and no run has more
# What neither HTML nor SVG may hold (XML 1.0, "Char"), and what would turn a line of text round.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands for it where it cannot be seen.

    Attributes:
        name: of its files and its place in the page: small letters, digits and hyphens.
        title: what it shows, short.
        summary: what it says, in a sentence or two.
        draw: draws it.
        tables: its figures, all of them.
    """

    name: str
    title: str
    summary: str
    draw: Drawing
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Provenance:
    """Where the figures of a file come from (`environment.provenance_record`); empty where the file does not say."""

    provenance: str
    device: str
    driver: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class Source:
    """A file that a section was made of."""

    file: str
    provenance: Provenance


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its place in the page: small letters, digits and hyphens.
        title: its heading.
        text: what one needs to know to read it.
        charts: in their order.
        tables: those that stand beside no chart.
        highlights: (figure, what it is) for the head of the page.
        quoted: the figures in it that others measured and whose they are; empty where there are none.
        sources: what it was made of.
    """

    name: str
    title: str
    text: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    highlights: tuple[tuple[str, str], ...] = ()
    quoted: str = ""
    sources: tuple[Source, ...] = ()


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

    def texts(self) -> dict[str, str]:
        """The whole object as strings by name."""
        return {name: self.text(name) for name in self.raw}

    def phases(self, name: str) -> dict[str, Peak]:
        """At least one peak by phase, as `MemoryProfile.to_dict` lists them; each phase is one that runs have."""
        peaks = {}
        for phase in self.objects(name):
            if phase.text("name") not in PHASES:
                raise ValueError(f"{self._place}{name}: {phase['name']!r} is not one of {', '.join(PHASES)}")
            peaks[phase.text("name")] = Peak(*(phase.count(field.name) for field in dataclasses.fields(Peak)))
        return peaks

    def row(self, kind: type[_Type]) -> _Type:
        """A dataclass of texts, counts, flags, each from the field of its name, and peaks: what `plain_row` wrote.

        None stands where that is allowed; a field with a default may be absent.
        """
        hints = get_type_hints(kind).items()
        there = {name: hint for name, hint in hints if name in self.raw or not hasattr(kind, name)}  # a default is one
        return kind(**{name: self._value(name, hint) for name, hint in there.items()})

    def rows(self, name: str, kind: type[_Type]) -> tuple[_Type, ...]:
        """A list of at least one of those."""
        return tuple(item.row(kind) for item in self.objects(name))

    def convert(self, kind: type[_Type]) -> _Type:
        """A dataclass of dataclasses, mappings and the like, from the whole object."""
        try:
            return msgspec.convert(self.raw, kind)
        except msgspec.ValidationError as error:
            why, _, place = str(error).partition(" - at `$.")
            raise ValueError(f"{self._place}{place.rstrip('`')}: {why}") from None

    def _value(self, name: str, hint: Any) -> Any:
        if hint is Peak:
            return Peak(*(self.count(f"peak_{field.name}_bytes") for field in dataclasses.fields(Peak)))
        if hint == Mapping[str, Peak]:
            return self.phases(name) if self[name] else {}
        if isinstance(hint, types.UnionType):
            if self[name] is None:
                return None
            (hint,) = (each for each in hint.__args__ if each is not types.NoneType)
        return {str: self.text, int: self.count, bool: self.flag}[hint](name)

    def _take(self, name: str, kind: type[_Type], words: str) -> _Type:
        value = self[name]
        if not isinstance(value, kind):
            raise ValueError(f"{self._place}{name}: {value!r} is not {words}")  # noqa: TRY004
        return value


def provenance_of(content: Fields) -> Provenance:
    """The provenance record of a file's `environment`.

    Raises:
        ValueError: it is missing or incomplete.
    """
    record = content.object("environment")
    names = [field.name for field in dataclasses.fields(Provenance) if field.name != "versions"]
    return Provenance(**{name: record.text(name) for name in names}, versions=record.object("versions").texts())


@dataclass(frozen=True)
class Kind(Generic[_Data]):
    """One kind of file.

    Attributes:
        text: what it is, with the command that writes it.
        recognises: whether an object is of this kind, by its fields.
        read: from the object to what its section needs; its exceptions say what is wrong with it.
        sections: sections of all files of this kind.
        provenance: where the object's figures come from.
    """

    text: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], _Data]
    sections: Callable[[Sequence[tuple[Source, _Data]]], list[Section]]
    provenance: Callable[[Fields], Provenance] = provenance_of


def has_rows(name: str, *fields: str) -> Callable[[Mapping[str, Any]], bool]:
    """Recognises an object by its list `name`, in which one row or more has all those fields."""

    def recognises(content: Mapping[str, Any]) -> bool:
        rows = content.get(name)
        return isinstance(rows, list) and any(isinstance(row, dict) and row.keys() >= set(fields) for row in rows)

    return recognises


def together(
    section: Callable[[Sequence[tuple[str, _Data]]], Section],
) -> Callable[[Sequence[tuple[Source, tuple[str, _Data]]]], list[Section]]:
    """One section for the runs of all files, each with what it is called.

    Those of one name have their file's behind it; those of none have that alone.
    """

    def sections(found: Sequence[tuple[Source, tuple[str, _Data]]]) -> list[Section]:
        names = [name for _, (name, _) in found]
        runs = []
        for source, (name, data) in found:
            stem = str(Path(source.file).with_suffix(""))
            runs.append(((f"{name} ({stem})" if names.count(name) > 1 else name) if name else stem, data))
        return [dataclasses.replace(section(runs), sources=tuple(source for source, _ in found))]

    return sections


def each_its_own(
    section: Callable[[Provenance, _Data], Section],
) -> Callable[[Sequence[tuple[Source, _Data]]], list[Section]]:
    """A section a file; where there are several, the title says on which device, unless others measured on many."""

    def sections(found: Sequence[tuple[Source, _Data]]) -> list[Section]:
        made = []
        for source, data in found:
            one = section(source.provenance, data)
            device = f", {source.provenance.device}" if len(found) > 1 and not one.quoted else ""
            made.append(dataclasses.replace(one, title=f"{one.title}{device}", sources=(source,)))
        return made

    return sections


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, with what no page can show replaced in its texts; None if it holds something else.

    Raises:
        UsageError: it cannot be read or is not JSON.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
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
