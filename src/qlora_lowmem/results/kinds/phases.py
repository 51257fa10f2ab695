"""The whole life of a run: the peak of every phase, from loading to merging, beside what the card may hold."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import PHASES, Peak
from qlora_lowmem.results.kinds import Chart, Kind, Provenance, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, one_of, read_as
from qlora_lowmem.results.style import Axes, Figure, Style, legend_label, note
from qlora_lowmem.results.subject import subject
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    Cell,
    Column,
    Table,
    gib,
    launches_column,
    markdown_of,
    page_table,
    write_rows,
)
from qlora_lowmem.units import GIB


@dataclass(frozen=True)
class PhaseBytes:
    """The peaks of one phase, and its budgets.

    Attributes:
        phase: one of `memory.profile.PHASES`.
        peak: in bytes; if memory ran out, until there.
        device_budget, allocated_budget: what the card may hold; what tensors may take, None where nobody set that.
        floor: what no method of training the recipe avoids; 0 where no step ended.
        out_of_memory: torch's message if memory ran out in this phase, else empty.
        launches: the most that one stretch of it submitted to the card, a step for instance; None where nobody counted.
    """

    phase: str
    peak: Peak
    device_budget: int
    allocated_budget: int | None = None
    floor: int = 0
    out_of_memory: str = ""
    launches: int | None = None

    @property
    def over(self) -> list[str]:
        """What is over its budget: `allocated`, `on the card`."""
        allocated = self.allocated_budget is not None and self.peak.allocated > self.allocated_budget
        figures = {"allocated": allocated, "on the card": self.peak.device > self.device_budget}
        return [name for name, over in figures.items() if over]

    @property
    def fails(self) -> bool:
        """Whether it is over a budget or memory ran out."""
        return bool(self.over or self.out_of_memory)

    @property
    def verdict(self) -> Cell:
        """In words."""
        if self.fails:
            return Cell("out of memory" if self.out_of_memory else f"over: {' and '.join(self.over)}", tone="bad")
        return Cell("within budget", tone="good")

    @property
    def end(self) -> int:
        """Where its bar or its mark ends, whichever is further."""
        return max(self.peak.device, self.allocated_budget or 0)


def phase_bytes(
    phases: Mapping[str, Peak],
    device_budget: int,
    allocated_budgets: Mapping[str, int] | None = None,
    out_of_memory: Mapping[str, str] | None = None,
    floor: int = 0,
    launches: Mapping[str, int | None] | None = None,
) -> tuple[PhaseBytes, ...]:
    """The phases of a profile beside their budgets, in bytes and in the order of a run's life.

    Args:
        allocated_budgets: by phase; None where nobody set budgets.
        out_of_memory: torch's message by the phase in which memory ran out. A phase that has no readings gets zeros; a
            moment that is no phase (between two of them) counts to the last phase with readings.
        launches: by phase, where they were counted.
    """
    peaks = dict(phases)
    messages = {}
    for name, message in (out_of_memory or {}).items():
        phase = name if name in PHASES else list(phases)[-1] if phases else PHASES[0]
        messages[phase] = message or "out of memory"
        peaks.setdefault(phase, Peak())
    budgets = allocated_budgets or dict.fromkeys(peaks)
    counted = launches or {}
    return tuple(
        PhaseBytes(name, peaks[name], device_budget, budgets[name], floor, messages.get(name, ""), counted.get(name))
        for name in PHASES
        if name in peaks
    )


Lives = Mapping[str, Sequence[PhaseBytes]]  # the phases of each recipe, in the order of PHASES

# Why the same recipe has other figures in the matrix.
CHECKPOINT_TEXT = (
    "Weights that were read from a checkpoint lie in other blocks of the allocator than random ones made in place: it "
    "rounds up some MiB less, so the peak of a step is that much lower than in the matrix."
)
_EDGED: dict[str, Any] = {"edgecolor": "edge", "linewidth": 0.6}
_STRIPED: dict[str, Any] = {"facecolor": "bad", "edgecolor": "paper", "linewidth": 0, "hatch": "///"}
_Row = tuple[str, PhaseBytes]  # a recipe and one of its phases
_COLUMNS: tuple[Column[_Row], ...] = (
    Column("recipe", lambda row: Cell(row[0])),
    Column("phase", lambda row: Cell(row[1].phase)),
    Column("allocated", lambda row: Cell.gib(row[1].peak.allocated)),
    Column("budget", lambda row: Cell.known_gib(row[1].allocated_budget), "allocated budget"),
    Column("reserved", lambda row: Cell.gib(row[1].peak.reserved)),
    Column("on the card", lambda row: Cell.gib(row[1].peak.device)),
    Column("budget on the card", lambda row: Cell.gib(row[1].device_budget), "card budget"),
    launches_column("launches", lambda row: row[1].launches),
)
_FLOOR_COLUMNS: tuple[Column[_Row], ...] = (
    Column("recipe", lambda row: Cell(row[0])),
    Column("highest in", lambda row: Cell(row[1].phase)),
    Column("allocated", lambda row: Cell.gib(row[1].peak.allocated)),
    Column("floor", lambda row: Cell.known_gib(row[1].floor)),
    Column("x floor", lambda row: Cell.times_floor(row[1].peak.allocated, row[1].floor)),
)


def _rows(lives: Lives) -> list[_Row]:
    return [(recipe, each) for recipe, life in lives.items() for each in life]


def _highest(lives: Lives) -> list[_Row]:
    """The phase of each in which tensors take most, the first of those with the same: it is held against the floor."""
    return [(recipe, max(life, key=lambda each: each.peak.allocated)) for recipe, life in lives.items()]


@dataclass(frozen=True)
class _Case:
    """A row of the file."""

    recipe: str
    phase: Annotated[str, one_of(PHASES)]
    allocated_bytes: Count
    allocated_budget_bytes: Count | None
    reserved_bytes: Count
    device_bytes: Count
    device_budget_bytes: Count
    floor_bytes: Count
    out_of_memory: str | None
    launches: Count | None = None


def phases_content(model: str, lives: Lives, record: dict[str, Any]) -> dict[str, Any]:
    """What `phases.json` and `qlora_lowmem.phases --json` hold; `record` is the figures' provenance."""
    cases = [
        _Case(
            recipe,
            each.phase,
            each.peak.allocated,
            each.allocated_budget,
            each.peak.reserved,
            each.peak.device,
            each.device_budget,
            each.floor,
            each.out_of_memory or None,
            each.launches,
        )
        for recipe, each in _rows(lives)
    ]
    return {"environment": record, "model": model, "cases": [asdict(case) for case in cases]}


def write_phases(folder: Path, model: str, lives: Lives, record: dict[str, Any], about: str) -> None:
    """Write `phases` as JSON, Markdown and CSV; `about` says what ran."""
    rows = _rows(lives)
    ran_out = "\n".join(f"- {name}, {each.phase}: {each.out_of_memory}" for name, each in rows if each.out_of_memory)
    parts = [
        f"{about} Reserved does not fall within a process: the allocator keeps what it has. {CHECKPOINT_TEXT}",
        markdown_of(_COLUMNS, rows, text_columns=2),
        f"The highest phase of each beside the floor of its training steps. {FLOOR_TEXT}",
        markdown_of(_FLOOR_COLUMNS, _highest(lives), text_columns=2),
        *(("Out of memory, with the highest readings until there:", ran_out) if ran_out else ()),
    ]
    title = f"Every phase of a run on {record['device']}, in GiB"
    content = phases_content(model, lives, record)
    write_rows(folder, "phases", content["cases"], record, title=title, parts=parts, head={"model": model})


@dataclass(frozen=True)
class _File(Cases[_Case]):
    model: str = ""


def _read(content: Mapping[str, Any]) -> tuple[str, Lives]:
    """The model, and the cases of a `phases.json`; a phase is there once a recipe, and a recipe has one floor."""
    file = read_as(_File, content)
    lives: dict[str, dict[str, PhaseBytes]] = {}
    for case in file.cases:
        life = lives.setdefault(case.recipe, {})
        if case.phase in life:
            raise ValueError(f"phase: {case.recipe!r} has {case.phase!r} twice")
        if 0 in (case.device_budget_bytes, case.allocated_budget_bytes):
            raise ValueError(f"a budget of the phase {case.phase!r} is 0")
        if any(other.floor != case.floor_bytes for other in life.values()):
            raise ValueError(f"floor_bytes: {case.recipe!r} has several")
        peak = Peak(case.allocated_bytes, case.reserved_bytes, case.device_bytes)
        budgets, ran_out = (case.device_budget_bytes, case.allocated_budget_bytes), case.out_of_memory
        said = "" if ran_out is None else ran_out or "out of memory"
        life[case.phase] = PhaseBytes(case.phase, peak, *budgets, case.floor_bytes, said, case.launches)
    return file.model, {r: tuple(life[name] for name in PHASES if name in life) for r, life in lives.items()}


def _section(provenance: Provenance, read: tuple[str, Lives]) -> Section:
    model, lives = read
    every = [each for _, each in _rows(lives)]
    within = sum(not each.fails for each in every)
    budgets = (
        "Each phase has a budget for what tensors take, and one for what the card holds with the CUDA context, which is"
        if any(each.allocated_budget is not None for each in every)
        else "What the card may hold is what a job can use there; with the CUDA context, what it holds is"
    )
    return Section(
        name="phases",
        title="The whole life of a run",
        text=f"A card that trains must also load, evaluate, save and merge. {budgets} the figure behind a bar. "
        "Resuming and merging are processes of their own. Within a process reserved does not fall: the allocator keeps "
        f"what it has. {CHECKPOINT_TEXT} {FLOOR_TEXT}",
        charts=(chart_of("phases", subject(model, on=provenance.where), lives, whole=True),),
        tables=tables_of(lives),
        model=model,
        highlights=((f"{within} of {len(every)}", "phases of a run stay within their budgets"),),
    )


KIND = Kind(
    "peaks by phase (phases --json)", has_rows("cases", "phase", "device_budget_bytes"), _read, each_its_own(_section)
)


def chart_of(name: str, of: str, lives: Lives, *, whole: bool) -> Chart:
    """The chart of those phases with a table a recipe; `whole`: name the phases of a whole life that have none."""
    tables = tuple(_table(recipe, life) for recipe, life in lives.items())
    summary = _summary(lives, whole=whole)
    return Chart(name, "Peak of each phase", of, summary, lambda style: phases(style, lives), tables)


def tables_of(lives: Lives) -> tuple[Table, ...]:
    """The highest phase of each recipe beside its floor, and what torch said where memory ran out."""
    floors = page_table("What tensors take at most, beside the floor, in GiB", _FLOOR_COLUMNS, _highest(lives))
    columns: tuple[Column[_Row], ...] = (
        Column("recipe", lambda row: Cell(row[0])),
        Column("phase", lambda row: Cell(row[1].phase, tone="bad")),
        Column("torch says", lambda row: Cell(row[1].out_of_memory)),
    )
    ran_out = [row for row in _rows(lives) if row[1].out_of_memory]
    return (floors, page_table("Where memory ran out", columns, ran_out)) if ran_out else (floors,)


def _summary(lives: Lives, *, whole: bool) -> str:
    """What failed; the first phase in which the card holds most; what has no figures, as after memory ended a run."""
    rows = _rows(lives)
    there = {(recipe, each.phase) for recipe, each in rows}
    ran_out = [f"{each.phase} of {recipe}" for recipe, each in rows if each.out_of_memory]
    over = [f"{each.phase} of {recipe}" for recipe, each in rows if each.over]
    tops = [(recipe, max(life, key=lambda each: each.peak.device)) for recipe, life in lives.items()]
    most = [f"{recipe} {gib(top.peak.device)} of {gib(top.device_budget)} GiB ({top.phase})" for recipe, top in tops]
    missing = [f"{name} of {recipe}" for recipe in lives for name in PHASES if whole and (recipe, name) not in there]
    texts = (
        f"Out of memory: {', '.join(ran_out)}; the peaks there are those until then." if ran_out else "",
        f"Over budget: {', '.join(over)}." if over else "",
        "" if ran_out or over else f"All {len(rows)} phases stay within their budgets.",
        f"The most that the card holds, and the first phase with it: {', '.join(most)}.",
        f"Without figures: {', '.join(missing)}." if missing else "",
    )
    return " ".join(text for text in texts if text)


def _table(recipe: str, life: Sequence[PhaseBytes]) -> Table:
    """Without a column of budgets where nobody set one for what tensors take."""
    budgets = any(each.allocated_budget is not None for each in life)
    columns = [column for column in _COLUMNS[1:] if budgets or column.heading != "budget"]
    columns.append(Column("verdict", lambda row: row[1].verdict))
    return page_table(f"Peaks of {recipe} in GiB by phase", columns, _rows({recipe: life}))


def phases(style: Style, lives: Lives) -> Figure:
    """A row a phase: allocated within reserved within what the card holds; what fails is striped. No life is empty."""
    found = [each for _, each in _rows(lives)]
    names = [name for name in PHASES if any(each.phase == name for each in found)]
    columns = 1 if style.narrow or len(lives) == 1 else 2
    lines = -(-len(lives) // columns)
    rows = style.row_height * len(names)
    figure = style.figure(lines * (rows + 0.7) + (1.4 if style.narrow else 0.7))
    panels = list(figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.06}).flat)
    # Room for the words behind the longest bar.
    words = 0.44 if any(each.out_of_memory for each in found) else 0.3 if any(each.over for each in found) else 0.2
    room = 1 + words if style.narrow or columns == 2 else 1 + words / 2
    end = max(max(each.device_budget for each in found) * 1.04, max(each.end for each in found) * room) / GIB
    for number, (panel, (recipe, life)) in enumerate(zip(panels, lives.items(), strict=False)):
        panel.set_title(legend_label(recipe), loc="left", fontsize=9, fontweight="bold")
        _panel(panel, style, names, life, end)
        if number % columns and not style.narrow:
            panel.tick_params(axis="y", labelleft=False)
    for panel in panels[len(lives) :]:  # the last line may have room left
        panel.set_axis_off()
    _legend(figure, style, found)
    return figure


def _panel(axes: Axes, style: Style, names: Sequence[str], found: Sequence[PhaseBytes], end: float) -> None:
    places, height = style.name_rows(axes, names)
    by_name = {each.phase: each for each in found}
    for budget in dict.fromkeys(by_name[name].device_budget for name in names if name in by_name):
        # The paper's edge parts it from a bar that it crosses.
        axes.axvline(budget / GIB, color=style.theme["paper"], linewidth=3.2, zorder=2.5)
        axes.axvline(budget / GIB, color=style.theme["limit"], linewidth=1.4, linestyle="--", zorder=2.6)
    for name, place in zip(names, places, strict=True):
        if name in by_name:
            _row(axes, style, place, height, by_name[name])
        else:
            note(axes, "no figures", (0, place), (4, 0), va="center", color=style.theme["muted"])
    axes.set_xlim(0, end)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("GiB at the peak of the phase")
    style.plain(axes, grid="x")


def _row(axes: Axes, style: Style, place: float, height: float, found: PhaseBytes) -> None:
    peak, over = found.peak, "on the card" in found.over or found.out_of_memory
    layers = (
        (peak.device, "context", over),
        (peak.reserved, "slack", False),
        (peak.allocated, "bar", "allocated" in found.over),
    )
    for count, role, striped in layers:  # each covers the one before
        look = _STRIPED if striped else {"facecolor": role, **_EDGED}
        axes.barh(place, count / GIB, height=height, **style.look(**look))
    if found.allocated_budget is not None:
        for colour, width in (("paper", 3.6), ("limit", 1.8)):
            style.tick(axes, found.allocated_budget / GIB, place, height / 2 + 0.06, colour, width)
    failed = ", out of memory" if found.out_of_memory else ", over" if found.over else ""
    style.words(axes, f"{found.peak.device / GIB:.3f}{failed}", found.end / GIB, place, zorder=4)


def _legend(figure: Figure, style: Style, found: Sequence[PhaseBytes]) -> None:
    budgets = sorted({each.device_budget for each in found})
    text = f"budget on the card: {', '.join(f'{budget / GIB:.2f}' for budget in budgets)}"
    reasons = ["over budget"] if any(each.over for each in found) else []
    reasons += ["out of memory"] if any(each.out_of_memory for each in found) else []
    handles = [style.patch("allocated", facecolor="bar", **_EDGED)]
    if any(each.allocated_budget is not None for each in found):
        mark = {"linestyle": "none", "marker": "|", "markersize": 11, "markeredgewidth": 1.8}
        handles.append(style.stroke("budget of allocated", color="limit", **mark))
    handles += [
        style.patch("reserved", facecolor="slack", **_EDGED),
        style.patch("on the card", facecolor="context", **_EDGED),
        style.stroke(text, color="limit", linewidth=1.4, linestyle="--"),
    ]
    if reasons:
        label = "striped: fails" if style.narrow and len(reasons) > 1 else f"striped: {' or '.join(reasons)}"
        handles.append(style.patch(label, **_STRIPED))
    columns = 2 if style.narrow else len(handles) if len(handles) < 6 else 3
    style.legend(figure, handles, columns, columnspacing=1.0, handlelength=1.6)
