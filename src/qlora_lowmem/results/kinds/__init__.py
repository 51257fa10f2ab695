"""What a kind of result is: how its file is recognised and read, and the section of a page that shows it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from qlora_lowmem.results.reading import read_as
from qlora_lowmem.results.style import Drawing
from qlora_lowmem.results.tables import Table

_Data = TypeVar("_Data")


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands for it where it cannot be seen: what it says in a sentence or two, and its figures.

    Attributes:
        subject: what it is of: model, length, recipe, card, as far as its file says (`results.subject`).
    """

    name: str
    title: str
    subject: str
    summary: str
    draw: Drawing
    tables: tuple[Table, ...]

    @property
    def heading(self) -> str:
        """Above it, wherever it stands."""
        return f"{self.title}: {self.subject}" if self.subject else self.title


@dataclass(frozen=True)
class Provenance:
    """Where the figures of a file come from (`environment.provenance_record`); empty where the file does not say."""

    provenance: str
    device: str
    driver: str
    versions: Mapping[str, str]
    commit: str
    command: str
    date: str

    @property
    def where(self) -> str:
        """The card, and whether it is one."""
        return f"{self.device} ({self.provenance})"


@dataclass(frozen=True)
class Source:
    """A file that a section was made of."""

    file: str
    provenance: Provenance


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        text: what one needs to know to read it.
        tables: those that stand beside no chart.
        highlights: (figure, what it is) for the head of the page.
        model: the model that it is of; empty where its file does not say or has many.
        quoted: the figures in it that others measured and whose they are; empty where there are none.
    """

    name: str
    title: str
    text: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    highlights: tuple[tuple[str, str], ...] = ()
    model: str = ""
    quoted: str = ""
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class _Made:
    environment: Provenance


def provenance_of(content: Mapping[str, Any]) -> Provenance:
    """The provenance record of a file's `environment`. Raises ValueError: it is missing or incomplete."""
    return read_as(_Made, content).environment


@dataclass(frozen=True)
class Kind(Generic[_Data]):
    """One kind of file.

    Attributes:
        text: what it is, with the command that writes it.
        recognises: whether an object is of this kind, by its fields.
        read: from the object to what its section needs; its exceptions say what is wrong with it.
        sections: of all files of this kind.
    """

    text: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], _Data]
    sections: Callable[[Sequence[tuple[Source, _Data]]], list[Section]]
    provenance: Callable[[Mapping[str, Any]], Provenance] = provenance_of


def has_rows(name: str, *fields: str) -> Callable[[Mapping[str, Any]], bool]:
    """Recognises an object by its list `name`, in which one row or more has all those fields."""

    def recognises(content: Mapping[str, Any]) -> bool:
        rows = content.get(name)
        return isinstance(rows, list) and any(isinstance(row, dict) and row.keys() >= set(fields) for row in rows)

    return recognises


def together(
    section: Callable[[Sequence[tuple[str, _Data]]], Section],
) -> Callable[[Sequence[tuple[Source, tuple[str, _Data]]]], list[Section]]:
    """One section for the runs of all files. Those of one name have their file's behind it; of none that alone."""

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
