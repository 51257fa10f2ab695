"""Lean beside the optimised recipe, model by model: what each peaks at, and the floor under both."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, read_as
from qlora_lowmem.results.style import Axes, Figure, Style
from qlora_lowmem.results.subject import subject
from qlora_lowmem.results.tables import FLOOR_TEXT, Cell, Column, launches_column, markdown_of, page_table, write_rows
from qlora_lowmem.units import GIB


@dataclass(frozen=True)
class Pair:
    """Allocated peaks of both recipes with one model at one length, in bytes; the optimised one is above the floor.

    Launches are of a micro-batch; None where nobody counted.
    """

    model: str
    tokens: Count
    optimised_allocated_bytes: Count
    lean_allocated_bytes: Count
    floor_bytes: Count
    optimised_launches: Count | None = None
    lean_launches: Count | None = None

    @property
    def saves(self) -> int:
        """What lean's peak is less than the optimised recipe's."""
        return self.optimised_allocated_bytes - self.lean_allocated_bytes

    @property
    def share(self) -> float:
        """That, of what the optimised recipe has above the floor."""
        return self.saves / (self.optimised_allocated_bytes - self.floor_bytes)

    @property
    def times_launches(self) -> float | None:
        """Lean's launches over the optimised recipe's."""
        if self.lean_launches is None or not self.optimised_launches:
            return None
        return self.lean_launches / self.optimised_launches

    @property
    def end(self) -> int:
        """The higher of both peaks."""
        return max(self.optimised_allocated_bytes, self.lean_allocated_bytes)


_COLUMNS: tuple[Column[Pair], ...] = (
    Column("model", lambda pair: Cell(pair.model)),
    Column("tokens", lambda pair: Cell.count(pair.tokens)),
    Column("optimised", lambda pair: Cell.gib(pair.optimised_allocated_bytes)),
    Column("lean", lambda pair: Cell.gib(pair.lean_allocated_bytes)),
    Column("saves", lambda pair: Cell.gib(pair.saves)),
    Column("floor", lambda pair: Cell.gib(pair.floor_bytes)),
    Column("x floor", lambda pair: Cell.times_floor(pair.lean_allocated_bytes, pair.floor_bytes), "lean × floor"),
    Column("of what is above the floor", lambda pair: Cell.ratio(f"{pair.share:.0%}", pair.share)),
    launches_column("launches a micro-batch, optimised", lambda pair: pair.optimised_launches),
    launches_column("lean's", lambda pair: pair.lean_launches),
    Column("x launches", lambda pair: _times(pair.times_launches), "lean × launches", where_known=True),
)


def _times(ratio: float | None) -> Cell:
    return Cell("-") if ratio is None else Cell.ratio(f"{ratio:.2f}", ratio)


_TITLE = "Lean on the models that people fine-tune"


def write_families(folder: Path, pairs: Sequence[Pair], record: dict[str, Any]) -> None:
    """Write `lean-families` as JSON, Markdown and CSV."""
    text = (
        "Allocated peaks in GiB, random weights of each architecture, batch 1, r 8 on all linear layers, on a card of "
        "the kind with room for everything: the optimised recipe (checkpointing, fused loss) and lean, which is exact. "
        f"{FLOOR_TEXT}"
    )
    parts, head = (text, markdown_of(_COLUMNS, pairs)), {"provenance": record["provenance"]}
    write_rows(folder, "lean-families", pairs, record, title=_TITLE, parts=parts, head=head)


def _read(content: Mapping[str, Any]) -> tuple[Pair, ...]:
    pairs = read_as(Cases[Pair], content).cases
    for number, pair in enumerate(pairs):
        if 0 in astuple(pair):
            raise ValueError(f"cases[{number}] has tokens, a peak or a floor of 0")
        if pair.optimised_allocated_bytes <= pair.floor_bytes:
            raise ValueError(f"cases[{number}].optimised_allocated_bytes is not above the floor")
    return pairs


def _section(provenance: Provenance, pairs: tuple[Pair, ...]) -> Section:
    tokens = attrgetter("tokens")
    in_order = sorted(pairs, key=tokens)
    lengths = [list(found) for _, found in groupby(in_order, key=tokens)]
    longest = lengths[-1]
    said = [f"{found[0].tokens:,}" for found in lengths]
    ranges = [f"{_shares(found)} at {found[0].tokens:,} tokens" for found in lengths]
    chart = Chart(
        "families",
        "Peaks of lean and of the optimised recipe",
        subject(f"{len({pair.model for pair in pairs})} models", f"{' and '.join(said)} tokens", on=_where(provenance)),
        f"Of what the optimised recipe's peak has above the floor, lean saves {', '.join(ranges)}.",
        lambda style: families(style, lengths),
        (page_table("Allocated peaks in GiB by length and model", _COLUMNS, in_order),),
    )
    text = f"of what the optimised recipe has above the floor, saved by lean at {longest[0].tokens:,} tokens"
    return Section(
        name="families",
        title=_TITLE,
        text="A whole bar is the optimised recipe's allocated peak, its first part lean's. Both recipes train all "
        f"linear layers at batch size 1, from random weights of each architecture. {FLOOR_TEXT}",
        charts=(chart,),
        highlights=((_shares(longest), text),),
    )


def _where(provenance: Provenance) -> str:
    return f"a card of the kind of {provenance.where} with room for all"


def _shares(pairs: Sequence[Pair]) -> str:
    """The least and the largest share that lean saves."""
    shares = [pair.share for pair in pairs]
    return " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(shares), max(shares))))


KIND = Kind(
    "lean on models (pytest bench/test_lean_families.py)",
    has_rows("cases", "optimised_allocated_bytes", "lean_allocated_bytes"),
    _read,
    each_its_own(_section),
)


def families(style: Style, lengths: Sequence[Sequence[Pair]]) -> Figure:
    """A panel a length, one above the other on one scale; a bar a model. At least one length, each with a pair."""
    rows = [style.row_height * len(pairs) for pairs in lengths]
    figure = style.figure(sum(rows) + 0.3 * len(rows) + (1.2 if style.narrow else 0.8))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for panel, pairs in zip(panels, lengths, strict=True):
        panel.set_title(f"{pairs[0].tokens:,} tokens", loc="left", fontsize=9, fontweight="bold")
        places, height = style.name_rows(panel, [pair.model for pair in pairs])
        for place, pair in zip(places, pairs, strict=True):
            _row(panel, style, place, height, pair)
        style.plain(panel, grid="x")
    largest = max(pair.end for pairs in lengths for pair in pairs) / GIB
    panels[-1].set_xlim(0, largest * (1.04 if style.narrow else 1.2))
    panels[-1].set_xlabel("peak allocated, GiB")
    handles = [
        style.patch("lean", color="bar"),
        style.patch("saved against optimised", color="saved"),
        style.stroke("floor", color="floor", linewidth=2.5),
    ]
    style.legend(figure, handles, len(handles), columnspacing=1.0)
    return figure


def _row(axes: Axes, style: Style, place: float, height: float, pair: Pair) -> None:
    # The second covers a part of the first.
    for size, role in ((pair.optimised_allocated_bytes, "saved"), (pair.lean_allocated_bytes, "bar")):
        axes.barh(place, size / GIB, height=height, color=style.theme[role], linewidth=0)
    style.tick(axes, pair.floor_bytes / GIB, place, height / 2 + 0.04, "floor")
    words = f"{pair.lean_allocated_bytes / GIB:.3f} ({-pair.saves / GIB:+.3f})".replace("-", "−")
    style.row_words(axes, words, pair.end / GIB, place)
