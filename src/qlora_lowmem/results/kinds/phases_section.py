"""The whole life of a run: the peak of every phase, from loading to merging, beside its budgets."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lowmem.memory.profile import PHASES
from qlora_lowmem.results.kinds.phases import PhaseBytes, phases
from qlora_lowmem.results.kinds.phases_table import highest
from qlora_lowmem.results.parts import (
    Cell,
    Chart,
    Provenance,
    Section,
    Source,
    Table,
    gib_cell,
    known_gib_cell,
    times_floor_cell,
)
from qlora_lowmem.results.reading import Fields, provenance_of
from qlora_lowmem.results.tables import FLOOR_TEXT, gib

Lives = Mapping[str, tuple[PhaseBytes, ...]]  # the phases of each recipe, in the order of PHASES


def recognises(content: dict[str, Any]) -> bool:
    """Cases with a phase and what the card may hold in it."""
    cases = content.get("cases")
    fields = {"phase", "device_budget_bytes"}
    return isinstance(cases, list) and any(isinstance(case, dict) and fields <= case.keys() for case in cases)


def read(content: Fields) -> tuple[Provenance, Lives]:
    """The cases of a `phases.json`.

    Raises:
        ValueError: a field is missing or of another kind; a phase that no run has, or that a recipe has twice; a
            budget of 0; a recipe with several floors.
    """
    lives: dict[str, dict[str, PhaseBytes]] = {}
    for case in content.objects("cases"):
        found = _phase(case)
        life = lives.setdefault(case.text("recipe"), {})
        if found.phase not in PHASES:
            raise ValueError(f"phase: {found.phase!r} is not one of {', '.join(PHASES)}")
        if found.phase in life:
            raise ValueError(f"phase: {case.text('recipe')!r} has {found.phase!r} twice")
        if not found.device_budget or found.allocated_budget == 0:
            raise ValueError(f"a budget of the phase {found.phase!r} is 0")
        if any(other.floor != found.floor for other in life.values()):
            raise ValueError(f"floor_bytes: {case.text('recipe')!r} has several")
        life[found.phase] = found
    return provenance_of(content), {
        recipe: tuple(life[name] for name in PHASES if name in life) for recipe, life in lives.items()
    }


def _phase(case: Fields) -> PhaseBytes:
    return PhaseBytes(
        phase=case.text("phase"),
        allocated=case.count("allocated_bytes"),
        allocated_budget=None if case["allocated_budget_bytes"] is None else case.count("allocated_budget_bytes"),
        reserved=case.count("reserved_bytes"),
        device=case.count("device_bytes"),
        device_budget=case.count("device_budget_bytes"),
        floor=case.count("floor_bytes"),
        out_of_memory="" if case["out_of_memory"] is None else case.text("out_of_memory") or "out of memory",
    )


def sections(found: Sequence[tuple[Source, Lives]]) -> list[Section]:
    """One section a file."""
    return [_section(source, lives, len(found) > 1) for source, lives in found]


def _section(source: Source, lives: Lives, several: bool) -> Section:
    every = [each for life in lives.values() for each in life]
    within = sum(not each.fails for each in every)
    budgets = (
        "Each phase has a budget for what tensors take, and one for what the card holds with the CUDA context, which is"
        if any(each.allocated_budget is not None for each in every)
        else "What the card may hold is what a job can use there; with the CUDA context, what it holds is"
    )
    return Section(
        name="phases",
        title=f"The whole life of a run{f', {source.provenance.device}' if several else ''}",
        text=f"A card that trains must also load, evaluate, save and merge. {budgets} the figure behind a bar. "
        "Resuming and merging are processes of their own. Within a process reserved does not fall: the allocator keeps "
        f"what it has. {FLOOR_TEXT}",
        sources=(source,),
        charts=(chart_of("phases", lives, missing=True),),
        tables=tables_of(lives),
        highlights=((f"{within} of {len(every)}", "phases of a run stay within their budgets"),),
    )


def chart_of(name: str, lives: Lives, missing: bool) -> Chart:
    """The chart of those phases with a table a recipe; `missing`: name the phases of a whole life that have none."""
    texts = (_verdicts(lives), _most(lives), *(_missing(lives) if missing else ()))
    return Chart(
        name,
        "Peak of each phase",
        " ".join(text for text in texts if text),
        lambda style: phases(style, lives),
        tuple(_table(recipe, life) for recipe, life in lives.items()),
    )


def tables_of(lives: Lives) -> tuple[Table, ...]:
    """The highest phase of each recipe beside its floor, and what torch said where memory ran out."""
    tops = ((recipe, highest(life)) for recipe, life in lives.items())
    rows = tuple(
        (
            Cell(recipe),
            Cell(top.phase),
            gib_cell(top.allocated),
            known_gib_cell(top.floor),
            times_floor_cell(top.allocated, top.floor),
        )
        for recipe, top in tops
    )
    headers = ("recipe", "highest in", "allocated", "floor", "× floor")
    return (Table("What tensors take at most, beside the floor, in GiB", headers, rows), *_messages(lives))


def _messages(lives: Lives) -> tuple[Table, ...]:
    """No table where memory did not run out."""
    rows = tuple(
        (Cell(recipe), Cell(each.phase, tone="bad"), Cell(each.out_of_memory))
        for recipe, life in lives.items()
        for each in life
        if each.out_of_memory
    )
    return (Table("Where memory ran out", ("recipe", "phase", "torch says"), rows),) if rows else ()


def _verdicts(lives: Lives) -> str:
    ran_out = [f"{each.phase} of {recipe}" for recipe, life in lives.items() for each in life if each.out_of_memory]
    over = [f"{each.phase} of {recipe}" for recipe, life in lives.items() for each in life if each.over]
    texts = [
        *([f"Out of memory: {', '.join(ran_out)}; the peaks there are those until then."] if ran_out else []),
        *([f"Over budget: {', '.join(over)}."] if over else []),
    ]
    return " ".join(texts) or f"All {sum(map(len, lives.values()))} phases stay within their budgets."


def _most(lives: Lives) -> str:
    """The phase in which the card holds most, the first of those with the same."""
    parts = []
    for recipe, life in lives.items():
        top = max(life, key=lambda each: each.device)
        parts.append(f"{recipe} {gib(top.device)} of {gib(top.device_budget)} GiB ({top.phase})")
    return f"The most that the card holds, and the first phase with it: {', '.join(parts)}."


def _missing(lives: Lives) -> list[str]:
    """What has no figures: a run that memory ended has none of the phases after that."""
    missing = [
        f"{name} of {recipe}"
        for recipe, life in lives.items()
        for name in PHASES
        if name not in {each.phase for each in life}
    ]
    return [f"Without figures: {', '.join(missing)}."] if missing else []


def _table(recipe: str, life: Sequence[PhaseBytes]) -> Table:
    budgets = any(each.allocated_budget is not None for each in life)
    rows = tuple(
        (
            Cell(each.phase),
            gib_cell(each.allocated),
            *((_budget(each.allocated_budget),) if budgets else ()),
            gib_cell(each.reserved),
            gib_cell(each.device),
            gib_cell(each.device_budget),
            _verdict(each),
        )
        for each in life
    )
    budget = ("allocated budget",) if budgets else ()
    headers = ("phase", "allocated", *budget, "reserved", "on the card", "card budget", "verdict")
    return Table(f"Peaks of {recipe} in GiB by phase", headers, rows)


def _budget(size: int | None) -> Cell:
    return Cell("-") if size is None else gib_cell(size)


def _verdict(each: PhaseBytes) -> Cell:
    if each.out_of_memory:
        return Cell("out of memory", tone="bad")
    readings = (("allocated", each.allocated_over), ("on the card", each.device_over))
    over = [name for name, found in readings if found]
    return Cell(f"over: {' and '.join(over)}", tone="bad") if over else Cell("within budget", tone="good")
