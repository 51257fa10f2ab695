"""The matrix: every recipe's peaks, and whether it fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.kind import Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.tables import Cell, Table, count_cell, known_gib_cell, times_floor_cell


@dataclass(frozen=True)
class Case:
    """One row of a `matrix.json`, as the benchmark wrote it; bytes as integers, 0 for what is not known."""

    recipe: str
    device: str
    fits: bool
    lora_r: int
    targets: str
    tokens: int
    batch_size: int
    accumulation: int
    checkpointing: bool
    loss: str
    phases: dict[str, int]
    allocated: int
    reserved: int
    on_the_card: int
    floor: int
    out_of_memory: str


def recognises(content: dict[str, Any]) -> bool:
    """Cases with a recipe's hash that fit or do not."""
    cases = content.get("cases")
    fields = {"recipe_hash", "fits"}
    return isinstance(cases, list) and any(isinstance(case, dict) and fields <= case.keys() for case in cases)


def read(content: Fields) -> tuple[Provenance, tuple[Case, ...]]:
    """The cases of a `matrix.json`."""
    return provenance_of(content), tuple(_case(case) for case in content.objects("cases"))


def _case(case: Fields) -> Case:
    phases = case.objects("phases") if case["phases"] else []
    return Case(
        recipe=case.text("recipe"),
        device=case.text("device"),
        fits=case.flag("fits"),
        lora_r=case.count("lora_r"),
        targets=case.text("target_modules"),
        tokens=case.count("max_seq_length"),
        batch_size=case.count("batch_size"),
        accumulation=case.count("gradient_accumulation_steps"),
        checkpointing=case.flag("gradient_checkpointing"),
        loss=case.text("loss"),
        phases={phase.text("name"): phase.count("allocated") for phase in phases},
        allocated=case.count("peak_allocated_bytes"),
        reserved=case.count("peak_reserved_bytes"),
        on_the_card=case.count("peak_device_bytes"),
        floor=case.count("floor_bytes"),
        out_of_memory=case.text("out_of_memory"),
    )


def sections(found: Sequence[tuple[Source, tuple[Case, ...]]]) -> list[Section]:
    """One section a file."""
    return [_section(source, cases, len(found) > 1) for source, cases in found]


def _section(source: Source, cases: tuple[Case, ...], several: bool) -> Section:
    fitting = sum(case.fits for case in cases)
    return Section(
        name="matrix",
        title=f"The benchmark matrix{f', {source.provenance.device}' if several else ''}",
        text="Peaks in GiB: allocated by phase, then overall, reserved, and what the card must hold with the CUDA "
        "context. A recipe that does not fit ran on a card of the same kind with room for it: its figures are what it "
        "would need.",
        sources=(source,),
        tables=(_table(cases),),
        highlights=((f"{fitting} of {len(cases)}", f"recipes fit on {source.provenance.device}"),),
    )


def _verdict(case: Case) -> Cell:
    if case.fits:
        return Cell("fits", tone="good")
    return Cell("does not fit" if case.out_of_memory or case.on_the_card else "failed", tone="bad")


# What is asked for first stands first: a narrow screen shows few columns at a time.
_COLUMNS: tuple[tuple[str, Callable[[Case], Cell]], ...] = (
    ("recipe", lambda case: Cell(case.recipe)),
    ("card", lambda case: Cell(case.device)),
    ("verdict", _verdict),
    ("on the card", lambda case: known_gib_cell(case.on_the_card)),
    ("reserved", lambda case: known_gib_cell(case.reserved)),
    ("allocated", lambda case: known_gib_cell(case.allocated)),
    ("floor", lambda case: known_gib_cell(case.floor)),
    ("× floor", lambda case: times_floor_cell(case.allocated, case.floor)),
    ("load", lambda case: known_gib_cell(case.phases.get("load", 0))),
    ("first step", lambda case: known_gib_cell(case.phases.get("first step", 0))),
    ("steady", lambda case: known_gib_cell(case.phases.get("steady", 0))),
    ("seq", lambda case: count_cell(case.tokens)),
    ("batch", lambda case: Cell(f"{case.batch_size} × {case.accumulation}")),
    ("r", lambda case: count_cell(case.lora_r)),
    ("targets", lambda case: Cell(case.targets)),
    ("checkpointing", lambda case: Cell("yes" if case.checkpointing else "no")),
    ("loss", lambda case: Cell(case.loss)),
)


def _table(cases: Sequence[Case]) -> Table:
    one_card = len({case.device for case in cases}) == 1
    columns = [(header, cell) for header, cell in _COLUMNS if not (header == "card" and one_card)]
    rows = tuple(tuple(cell(case) for _, cell in columns) for case in cases)
    return Table("Peaks in GiB by recipe", tuple(header for header, _ in columns), rows)
