"""Which file is which, and what becomes of each kind: files in, sections out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.results.kind import Fields, Kind, NoObjectError, Section, Source, read_json
from qlora_lowmem.results.kinds import (
    attribution_section,
    families_section,
    lengths,
    longest,
    matrix_section,
    phases,
    prediction_section,
    published_section,
    run,
    verdicts_section,
    waterfall_section,
)


def _old(module: Any, text: str) -> Kind[Any]:
    return Kind(
        text,
        module.recognises,
        lambda content: module.read(content)[1],
        module.sections,
        lambda content: module.read(content)[0],
    )


# In the order of the page.
KINDS: tuple[Kind[Any], ...] = (
    _old(waterfall_section, "a waterfall (pytest bench/test_lean.py)"),
    _old(families_section, "lean on models (pytest bench/test_lean_families.py)"),
    _old(attribution_section, "an attribution (explain --json)"),
    phases.KIND,
    run.KIND,
    lengths.KIND,
    longest.KIND,
    _old(prediction_section, "a prediction (pytest bench/ --gpu)"),
    _old(published_section, "published peaks (pytest bench/test_reality.py)"),
    _old(verdicts_section, "verdicts (pytest --vram-report)"),
    _old(matrix_section, "a matrix (pytest bench/)"),
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
            fields, kind = Fields(content), KINDS[number]
            data, provenance = kind.read(fields), kind.provenance(fields)
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
