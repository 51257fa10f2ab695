"""What the card holds in each phase of a run, a panel a recipe, with what it may hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_lowmem.memory.profile import PHASES
from qlora_lowmem.results.style import SMALL, Style, legend_label, name_rows, plain, row_height, words_behind
from qlora_lowmem.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PhaseBytes:
    """The peaks of one phase, and its budgets.

    Attributes:
        phase: one of `memory.profile.PHASES`.
        allocated, reserved, device: as `memory.profile.Peak` has them; if memory ran out, until there.
        allocated_budget, device_budget: what the first and the last may be; None where nobody set one.
        floor: what no method of training the recipe avoids, the same in every phase; 0 where no step ended.
        out_of_memory: torch's message if memory ran out in this phase, else empty.
    """

    phase: str
    allocated: int
    allocated_budget: int | None
    reserved: int
    device: int
    device_budget: int
    floor: int = 0
    out_of_memory: str = ""

    @property
    def allocated_over(self) -> bool:
        """Whether tensors took more than they may."""
        return self.allocated_budget is not None and self.allocated > self.allocated_budget

    @property
    def device_over(self) -> bool:
        """Whether the card held more than it may."""
        return self.device > self.device_budget

    @property
    def over(self) -> bool:
        """Whether either did."""
        return self.allocated_over or self.device_over

    @property
    def fails(self) -> bool:
        """Whether it is over a budget or memory ran out."""
        return self.over or bool(self.out_of_memory)

    @property
    def end(self) -> int:
        """Where its bar or its mark ends, whichever is further."""
        return max(self.device, self.allocated_budget or 0)


def phases(style: Style, lives: Mapping[str, Sequence[PhaseBytes]]) -> "Figure":
    """A row a phase: allocated within reserved within what the card holds; what fails is striped.

    Args:
        lives: the phases of each recipe; at least one recipe, each with at least one phase.
    """
    there = {each.phase for life in lives.values() for each in life}
    names = [name for name in PHASES if name in there]
    columns = 1 if style.narrow or len(lives) == 1 else 2
    lines = -(-len(lives) // columns)
    rows = row_height(style) * len(names)
    figure = style.figure(lines * (rows + 0.7) + (1.4 if style.narrow else 0.7))
    panels = list(figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.06}).flat)
    for number, (recipe, found) in enumerate(lives.items()):
        panel = panels[number]
        panel.set_title(legend_label(recipe), loc="left", fontsize=9, fontweight="bold")
        _panel(panel, style, names, found, _reach(lives, style, columns))
        if number % columns and not style.narrow:
            panel.tick_params(axis="y", labelleft=False)
    for panel in panels[len(lives) :]:  # the last line may have room left
        panel.set_axis_off()
    _legend(figure, style, lives)
    return figure


def _reach(lives: Mapping[str, Sequence[PhaseBytes]], style: Style, columns: int) -> float:
    """The end of the scale in GiB, with room for the words behind the longest bar."""
    found = [each for life in lives.values() for each in life]
    largest = max(each.end for each in found) / GIB
    budget = max(each.device_budget for each in found) / GIB
    words = 0.44 if any(each.out_of_memory for each in found) else 0.3 if any(each.over for each in found) else 0.2
    room = 1 + words if style.narrow or columns == 2 else 1 + words / 2
    return max(budget * 1.04, largest * room)


def _panel(axes: "Axes", style: Style, names: Sequence[str], found: Sequence[PhaseBytes], reach: float) -> None:
    places, height = name_rows(axes, names, style)
    by_name = {each.phase: each for each in found}
    _budget_line(axes, style, [by_name[name].device_budget for name in names if name in by_name])
    for name, place in zip(names, places, strict=True):
        if name in by_name:
            _row(axes, style, place, height, by_name[name])
        else:
            axes.annotate(
                "no figures",
                (0, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=style.theme["muted"],
            )
    axes.set_xlim(0, reach)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("GiB at the peak of the phase")
    plain(axes, style, grid="x")


def _budget_line(axes: "Axes", style: Style, budgets: Sequence[int]) -> None:
    for budget in dict.fromkeys(budgets):  # the paper's edge parts it from a bar that it crosses
        axes.axvline(budget / GIB, color=style.theme["paper"], linewidth=3.2, zorder=2.5)
        axes.axvline(budget / GIB, color=style.theme["limit"], linewidth=1.4, linestyle="--", zorder=2.6)


def _row(axes: "Axes", style: Style, place: float, height: float, found: PhaseBytes) -> None:
    layers = (
        (found.device, "context", found.device_over or bool(found.out_of_memory)),
        (found.reserved, "slack", False),
        (found.allocated, "bar", found.allocated_over),
    )
    for count, role, over in layers:  # each covers the one before
        axes.barh(
            place,
            count / GIB,
            height=height,
            facecolor=style.theme["bad" if over else role],
            edgecolor=style.theme["paper" if over else "edge"],
            linewidth=0 if over else 0.6,
            hatch="///" if over else None,
        )
    reach = height / 2 + 0.06
    if found.allocated_budget is not None:
        mark = found.allocated_budget / GIB
        for colour, width in (("paper", 3.6), ("limit", 1.8)):
            axes.plot([mark, mark], [place - reach, place + reach], color=style.theme[colour], linewidth=width)
    failed = ", out of memory" if found.out_of_memory else ", over" if found.over else ""
    words_behind(axes, f"{found.device / GIB:.3f}{failed}", found.end / GIB, place, zorder=4)


def _legend(figure: "Figure", style: Style, lives: Mapping[str, Sequence[PhaseBytes]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours, found = style.theme, [each for life in lives.values() for each in life]
    edge = colours["edge"]
    handles: list[Patch | Line2D] = [Patch(facecolor=colours["bar"], edgecolor=edge, linewidth=0.6, label="allocated")]
    if any(each.allocated_budget is not None for each in found):
        look: Any = {"linestyle": "none", "marker": "|", "markersize": 11, "markeredgewidth": 1.8}
        handles.append(Line2D([], [], color=colours["limit"], label="budget of allocated", **look))
    handles += [
        Patch(facecolor=colours["slack"], edgecolor=edge, linewidth=0.6, label="reserved"),
        Patch(facecolor=colours["context"], edgecolor=edge, linewidth=0.6, label="on the card"),
    ]
    budgets = sorted({each.device_budget for each in found})
    text = f"budget on the card: {', '.join(f'{budget / GIB:.2f}' for budget in budgets)}"
    handles.append(Line2D([], [], color=colours["limit"], linewidth=1.4, linestyle="--", label=text))
    if any(each.fails for each in found):
        reasons = [
            text
            for text, there in (
                ("over budget", any(each.over for each in found)),
                ("out of memory", any(each.out_of_memory for each in found)),
            )
            if there
        ]
        label = "striped: fails" if style.narrow and len(reasons) > 1 else f"striped: {' or '.join(reasons)}"
        handles.append(
            Patch(facecolor=colours["bad"], edgecolor=colours["paper"], linewidth=0, hatch="///", label=label)
        )
    columns = 2 if style.narrow else len(handles) if len(handles) < 6 else 3
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.0, handlelength=1.6
    )
