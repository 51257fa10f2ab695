"""Memory against the length of a sequence, with the line of what the card has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.kinds.lengths import LengthPoint, lengths
from qlora_lowmem.results.parts import (
    Cell,
    Chart,
    Provenance,
    Section,
    Source,
    Table,
    count_cell,
    gib_cell,
    known_gib_cell,
    times_floor_cell,
)
from qlora_lowmem.results.reading import Fields, provenance_of
from qlora_lowmem.results.tables import FLOOR_TEXT, gib


@dataclass(frozen=True)
class _Peaks:
    point: LengthPoint
    allocated: int
    reserved: int


@dataclass(frozen=True)
class Lengths:
    """The content of a `lengths.json`."""

    device: str
    usable_bytes: int
    peaks: tuple[_Peaks, ...]


def recognises(content: dict[str, Any]) -> bool:
    """Cases with their tokens, and what the card has."""
    return "usable_bytes" in content and isinstance(content.get("cases"), list)


def read(content: Fields) -> tuple[Provenance, Lengths]:
    """Its cases, in bytes and tokens."""
    peaks = tuple(
        _Peaks(
            LengthPoint(
                case.text("recipe"),
                case.count("tokens"),
                case.flag("fits"),
                case.count("peak_device_bytes"),
                case.count("floor_bytes"),
            ),
            case.count("peak_allocated_bytes"),
            case.count("peak_reserved_bytes"),
        )
        for case in content.objects("cases")
    )
    usable = content.count("usable_bytes")
    if not usable or not all(peak.point.tokens and peak.point.floor_bytes for peak in peaks):
        raise ValueError("usable_bytes, or a case's tokens or floor, is 0")
    return provenance_of(content), Lengths(content.text("device"), usable, peaks)


def sections(found: Sequence[tuple[Source, Lengths]]) -> list[Section]:
    """One section a file."""
    return [_section(source, data, len(found) > 1) for source, data in found]


def _section(source: Source, data: Lengths, several: bool) -> Section:
    points = [peak.point for peak in data.peaks]
    chart = Chart(
        "lengths",
        "Memory against sequence length",
        f"{gib(data.usable_bytes)} GiB can be used on {data.device}. {_longest(points)}",
        lambda style: lengths(style, points, data.usable_bytes),
        (_table(data),),
    )
    return Section(
        name="lengths",
        title=f"How long a sequence may be{f', {data.device}' if several else ''}",
        text="What the card must hold at the peak, CUDA context included, for one sequence of that many tokens. The "
        f"dashed line is what a job can use on this card. {FLOOR_TEXT}",
        sources=(source,),
        charts=(chart,),
    )


def _longest(points: Sequence[LengthPoint]) -> str:
    parts = []
    for recipe in dict.fromkeys(point.recipe for point in points):
        fitting = [point.tokens for point in points if point.recipe == recipe and point.fits]
        parts.append(f"{recipe} {max(fitting):,} tokens" if fitting else f"{recipe} at none of them")
    return f"The longest of these lengths that fits: {', '.join(parts)}."


def _table(data: Lengths) -> Table:
    rows = tuple(
        (
            Cell(peak.point.recipe),
            count_cell(peak.point.tokens),
            known_gib_cell(peak.allocated),
            gib_cell(peak.point.floor_bytes),
            times_floor_cell(peak.allocated, peak.point.floor_bytes),
            known_gib_cell(peak.reserved),
            known_gib_cell(peak.point.peak_device_bytes),
            Cell("fits", tone="good") if peak.point.fits else Cell("does not fit", tone="bad"),
        )
        for peak in data.peaks
    )
    headers = ("recipe", "tokens", "allocated", "floor", "× floor", "reserved", "on the card", "verdict")
    return Table("Peaks in GiB by recipe and length", headers, rows)
