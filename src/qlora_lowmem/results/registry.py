"""Which file is which, and what becomes of each kind: files in, sections out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.results.kinds import (
    attribution_section as attribution,
)
from qlora_lowmem.results.kinds import (
    families_section as families,
)
from qlora_lowmem.results.kinds import (
    lengths_section as lengths,
)
from qlora_lowmem.results.kinds import (
    longest,
)
from qlora_lowmem.results.kinds import (
    matrix_section as matrix,
)
from qlora_lowmem.results.kinds import (
    phases_section as phases,
)
from qlora_lowmem.results.kinds import (
    prediction_section as prediction,
)
from qlora_lowmem.results.kinds import (
    published_section as published,
)
from qlora_lowmem.results.kinds import (
    run as runs,
)
from qlora_lowmem.results.kinds import (
    verdicts_section as verdicts,
)
from qlora_lowmem.results.kinds import (
    waterfall_section as waterfall,
)
from qlora_lowmem.results.parts import Section, Source
from qlora_lowmem.results.reading import Fields, NoObjectError, read_json


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        text: what it is, with the command that writes it.
        recognises: whether an object is of this kind, by its fields.
        read: from the object to its provenance and what its section needs; its exceptions say what is wrong with it.
        sections: sections of all files of this kind.
    """

    text: str
    recognises: Callable[[dict[str, Any]], bool]
    read: Callable[[Fields], tuple[Any, Any]]
    sections: Callable[[Sequence[tuple[Source, Any]]], list[Section]]


# In the order of the page.
KINDS: tuple[Kind, ...] = (
    Kind("a waterfall (pytest bench/test_lean.py)", waterfall.recognises, waterfall.read, waterfall.sections),
    Kind("lean on models (pytest bench/test_lean_families.py)", families.recognises, families.read, families.sections),
    Kind("an attribution (explain --json)", attribution.recognises, attribution.read, attribution.sections),
    Kind("peaks by phase (phases --json)", phases.recognises, phases.read, phases.sections),
    Kind("a training run (train --json)", runs.recognises, runs.read, runs.sections),
    Kind("peaks by length (lengths --table)", lengths.recognises, lengths.read, lengths.sections),
    Kind("the longest sequences (longest --table)", longest.recognises, longest.read, longest.sections),
    Kind("a prediction (pytest bench/ --gpu)", prediction.recognises, prediction.read, prediction.sections),
    Kind("published peaks (pytest bench/test_reality.py)", published.recognises, published.read, published.sections),
    Kind("verdicts (pytest --vram-report)", verdicts.recognises, verdicts.read, verdicts.sections),
    Kind("a matrix (pytest bench/)", matrix.recognises, matrix.read, matrix.sections),
)


@dataclass(frozen=True)
class Made:
    """What came of the files that were given.

    Attributes:
        sections: in the order of the page.
        left_out: JSON files of a folder that no section shows.
    """

    sections: tuple[Section, ...]
    left_out: tuple[Path, ...]


def sections_of(paths: Sequence[Path]) -> Made:
    """Read files, and the JSON files of folders.

    Raises:
        UsageError: a file that cannot be read or is not what it should be; a file that was named and that no section
            can show; nothing to show.
    """
    files, from_folders = _files(paths)
    found: dict[int, list[tuple[Source, Any]]] = {}
    left_out = []
    for path in files:
        try:
            content = read_json(path)
        except NoObjectError:
            if path not in from_folders:
                raise
            left_out.append(path)
            continue
        number = next((number for number, kind in enumerate(KINDS) if kind.recognises(content)), None)
        if number is None:
            if path not in from_folders:
                raise UsageError(f"{path} is nothing that a page shows. It shows {_SHOWN}")
            left_out.append(path)
            continue
        try:
            provenance, data = KINDS[number].read(Fields(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not {KINDS[number].text} as it should be: {error}; write it again") from None
        found.setdefault(number, []).append((Source(_label(path, files), provenance), data))
    if not found:
        given = ", ".join(str(path) for path in paths)
        raise UsageError(f"{given}: nothing in it that a page shows. It shows {_SHOWN}")
    sections = [section for number in sorted(found) for section in KINDS[number].sections(found[number])]
    return Made(tuple(sections), tuple(left_out))


_SHOWN = "; ".join(kind.text for kind in KINDS)


def _label(path: Path, files: Sequence[Path]) -> str:
    """The file's name, with its folder's where another file has the same."""
    shared = sum(other.name == path.name for other in files) > 1
    return f"{path.resolve().parent.name}/{path.name}" if shared else path.name


def _files(paths: Sequence[Path]) -> tuple[list[Path], set[Path]]:
    files: list[Path] = []
    from_folders: set[Path] = set()
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            files += inside
            from_folders |= set(inside)
        else:
            files.append(path)
    return list(dict.fromkeys(files)), from_folders - {path for path in paths if not path.is_dir()}
