"""What each case of the gate used, and what that is held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lowmem.results.style import Style, name_rows, plain, row_height, words_behind
from qlora_lowmem.units import MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Held:
    """One case.

    Attributes:
        name: what people read.
        measured_bytes: the figure that is judged.
        against_bytes: its baseline or limit; None where there is neither.
        fails: whether it is over.
    """

    name: str
    measured_bytes: int
    against_bytes: int | None
    fails: bool


def verdicts(style: Style, cases: Sequence[Held]) -> "Figure":
    """A bar a case with a mark where its baseline or limit is; what fails is striped and says so."""
    figure = style.figure(row_height(style) * len(cases) + (1.2 if style.narrow else 0.8))
    axes = figure.subplots()
    places, height = name_rows(axes, [case.name for case in cases], style)
    for place, case in zip(places, cases, strict=True):
        axes.barh(
            place,
            case.measured_bytes / MIB,
            height=height,
            facecolor=style.theme["bad" if case.fails else "bar"],
            edgecolor=style.theme["paper"],
            linewidth=0,
            hatch="///" if case.fails else None,
        )
        if case.against_bytes is not None:
            reach = height / 2 + 0.08
            mark, floor = case.against_bytes / MIB, style.theme["floor"]
            axes.plot([mark, mark], [place - reach, place + reach], color=floor, linewidth=2.5)
        end = max(case.measured_bytes, case.against_bytes or 0) / MIB
        words = f"{format_bytes(case.measured_bytes)}{', fails' if case.fails else ''}"
        words_behind(axes, words, end, place)
    ends = (max(case.measured_bytes, case.against_bytes or 0) for case in cases)
    largest = max(ends, default=MIB) / MIB
    axes.set_xlim(0, largest * (1.5 if style.narrow else 1.2))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4 if style.narrow else 8)
    axes.set_xlabel("MiB; the mark is the baseline or limit" if style.narrow else _EXPLAINED)
    plain(axes, style, grid="x")
    return figure


_EXPLAINED = "MiB at the peak that is judged; the mark is the baseline or the limit; striped fails"
