"""The longest sequence that trains, recipe by recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.parts import (
    Cell,
    Provenance,
    Section,
    Source,
    Table,
    count_cell,
    known_gib_cell,
    size_cell,
    times_floor_cell,
)
from qlora_lowmem.results.reading import Fields, provenance_of


@dataclass(frozen=True)
class _Longest:
    recipe: str
    tokens: int
    next_tokens: int
    allocated: int
    device: int
    floor: int
    host: int


@dataclass(frozen=True)
class Longest:
    """The content of a `longest.json`; `changes` are fields of every recipe."""

    changes: str
    cases: tuple[_Longest, ...]


def recognises(content: dict[str, Any]) -> bool:
    """Cases that say what did not fit any more."""
    cases = content.get("cases")
    return isinstance(cases, list) and any(isinstance(case, dict) and "next_tokens" in case for case in cases)


def read(content: Fields) -> tuple[Provenance, Longest]:
    """Its cases, in bytes and tokens; the floor of a recipe that fits at no length is 0."""
    cases = tuple(
        _Longest(
            case.text("recipe"),
            case.count("tokens"),
            case.count("next_tokens"),
            case.count("peak_allocated_bytes"),
            case.count("peak_device_bytes"),
            case.count("floor_bytes"),
            case.count("host_bytes"),
        )
        for case in content.objects("cases")
    )
    changes = content.object("changes")
    given = ", ".join(f"{name} {changes.text(name)}" for name in changes.raw)
    return provenance_of(content), Longest(given, cases)


def sections(found: Sequence[tuple[Source, Longest]]) -> list[Section]:
    """One section a file."""
    return [_section(source, data, len(found) > 1) for source, data in found]


def _section(source: Source, data: Longest, several: bool) -> Section:
    cases = data.cases
    best = max(cases, key=lambda case: case.tokens)
    rows = tuple(
        (
            Cell(case.recipe),
            count_cell(case.tokens),
            count_cell(case.next_tokens) if case.next_tokens else Cell("not looked further"),
            known_gib_cell(case.allocated),
            known_gib_cell(case.floor),
            times_floor_cell(case.allocated, case.floor),
            known_gib_cell(case.device),
            size_cell(case.host),
        )
        for case in cases
    )
    headers = (
        "recipe",
        "longest",
        "does not fit",
        "allocated GiB",
        "floor GiB",
        "× floor",
        "on the card GiB",
        "pinned host memory",
    )
    return Section(
        name="longest",
        title=f"The longest sequence that trains{f', {source.provenance.device}' if several else ''}",
        text="Tokens of one sample at batch size 1, found by running each length: two optimizer steps of one or two "
        "micro-batches." + (f" Changed in every recipe: {data.changes}." if data.changes else ""),
        sources=(source,),
        tables=(Table("Tokens, and peaks at the longest", headers, rows),),
        highlights=((f"{best.tokens:,} tokens", f"the longest sequence that trains ({best.recipe})"),),
    )
