"""Lean beside the optimised recipe on the models that people fine-tune."""

from collections.abc import Sequence
from typing import Any

from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.families import Pair, families
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Table, count_cell, gib_cell, ratio_cell, times_floor_cell


def recognises(content: dict[str, Any]) -> bool:
    """Cases with a peak of either recipe."""
    cases = content.get("cases")
    fields = {"optimised_allocated_bytes", "lean_allocated_bytes"}
    return isinstance(cases, list) and any(isinstance(case, dict) and fields <= case.keys() for case in cases)


def read(content: Fields) -> tuple[Provenance, tuple[Pair, ...]]:
    """The cases of a `lean-families.json`.

    Raises:
        ValueError: a field is missing or of another kind; a figure of 0; no peak above the floor.
    """
    pairs = tuple(
        Pair(
            case.text("model"),
            case.count("tokens"),
            case.count("optimised_allocated_bytes"),
            case.count("lean_allocated_bytes"),
            case.count("floor_bytes"),
        )
        for case in content.objects("cases")
    )
    for number, pair in enumerate(pairs):
        if not (pair.tokens and pair.optimised and pair.lean and pair.floor):
            raise ValueError(f"cases[{number}] has tokens, a peak or a floor of 0")
        if pair.optimised <= pair.floor:
            raise ValueError(f"cases[{number}].optimised_allocated_bytes is not above the floor")
    return provenance_of(content), pairs


def sections(found: Sequence[tuple[Source, tuple[Pair, ...]]]) -> list[Section]:
    """One section a file."""
    return [_section(source, pairs, len(found) > 1) for source, pairs in found]


def _section(source: Source, pairs: tuple[Pair, ...], several: bool) -> Section:
    lengths = [[pair for pair in pairs if pair.tokens == tokens] for tokens in sorted({pair.tokens for pair in pairs})]
    longest = lengths[-1]
    ranges = [f"{_shares(found)} at {found[0].tokens:,} tokens" for found in lengths]
    chart = Chart(
        "families",
        "Peaks of lean and of the optimised recipe",
        f"Of what the optimised recipe's peak has above the floor, lean saves {', '.join(ranges)}.",
        lambda style: families(style, lengths),
        (_table(lengths),),
    )
    text = f"of what the optimised recipe has above the floor, saved by lean at {longest[0].tokens:,} tokens"
    return Section(
        name="families",
        title=f"Lean on the models that people fine-tune{f', {source.provenance.device}' if several else ''}",
        text="A whole bar is the optimised recipe's allocated peak, its first part lean's. Both recipes train all "
        f"linear layers at batch size 1, from random weights of each architecture. {FLOOR_TEXT}",
        sources=(source,),
        charts=(chart,),
        highlights=((_shares(longest), text),),
    )


def _shares(pairs: Sequence[Pair]) -> str:
    """The least and the largest share that lean saves."""
    shares = [pair.share for pair in pairs]
    return " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))))


def _table(lengths: Sequence[Sequence[Pair]]) -> Table:
    rows = tuple(
        (
            Cell(pair.model),
            count_cell(pair.tokens),
            gib_cell(pair.optimised),
            gib_cell(pair.lean),
            gib_cell(pair.saves),
            gib_cell(pair.floor),
            times_floor_cell(pair.lean, pair.floor),
            ratio_cell(f"{pair.share:.0%}", pair.share),
        )
        for pairs in lengths
        for pair in pairs
    )
    headers = ("model", "tokens", "optimised", "lean", "saves", "floor", "lean × floor", "of what is above the floor")
    return Table("Allocated peaks in GiB by length and model", headers, rows)
