"""The comparison table of a benchmark run: one row a recipe, one set of files a device."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import MemoryProfile, Peak, Provenance
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.results import kinds
from qlora_lowmem.results.kinds import Kind, Section, each_its_own, has_rows
from qlora_lowmem.results.reading import Cases, PhasePeak, read_as
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    Cell,
    Column,
    gib,
    launches_column,
    markdown_of,
    markdown_page,
    page_table,
    plain_row,
    provenance_lines,
    write_result,
)


@dataclass(frozen=True)
class CaseResult:
    """What a recipe came to on a card.

    Attributes:
        fits: it trained on the card itself, within the memory that a job can count on there (`Card.usable_bytes`).
        profile: its peaks there; where it does not fit, the peaks with more room (a virtual card of the same kind with
            room for it; a real one without the cap), which say what it would need; None if that failed too.
        out_of_memory: torch's message, if it ran out on the card.
        failure: any other failure.
        floor_bytes: what no method of training the recipe avoids (`memory.owners`).
    """

    recipe: Recipe
    card: str
    provenance: Provenance
    fits: bool
    profile: MemoryProfile | None
    out_of_memory: str | None = None
    failure: str | None = None
    trainable_parameters: int = 0
    floor_bytes: int = 0

    @property
    def recipe_hash(self) -> str:
        """Equal hashes are the same training job."""
        return recipe_hash(self.recipe)


@dataclass(frozen=True)
class Case:
    """A row of the matrix; peaks of zeros, as the floor, where none is known.

    Attributes:
        target_modules: names with spaces between, or what the recipe says in one word.
        phases: peaks by phase; not in the CSV.
        failure: the last line of what went wrong other than memory; only in the Markdown.
        launches: kernels, copies and memsets of an optimizer step; None where nobody counted, or no step ended.
    """

    recipe: str
    recipe_hash: str
    device: str
    provenance: str
    fits: bool
    lora_r: Count
    target_modules: str
    max_seq_length: Count
    batch_size: Count
    gradient_accumulation_steps: Count
    gradient_checkpointing: bool
    loss: str
    trainable_parameters: Count
    peak: Peak
    floor_bytes: Count
    out_of_memory: str
    phases: tuple[PhasePeak, ...]
    failure: str = ""
    launches: Count | None = None


def _case(result: CaseResult) -> Case:
    recipe, profile = result.recipe, result.profile
    targets = recipe.lora.target_modules
    launches = profile.step_launches if profile else None
    return Case(
        recipe=recipe.name,
        recipe_hash=result.recipe_hash,
        device=result.card,
        provenance=profile.provenance if profile else result.provenance,
        fits=result.fits,
        lora_r=recipe.lora.lora_r,
        target_modules=targets if isinstance(targets, str) else " ".join(targets),
        max_seq_length=recipe.batch.max_seq_length,
        batch_size=recipe.batch.batch_size,
        gradient_accumulation_steps=recipe.batch.gradient_accumulation_steps,
        gradient_checkpointing=recipe.memory.gradient_checkpointing,
        loss=recipe.memory.loss,
        trainable_parameters=result.trainable_parameters,
        peak=profile.peak if profile else Peak(),
        floor_bytes=result.floor_bytes,
        out_of_memory=result.out_of_memory or "",
        phases=_phases(profile) if profile else (),
        failure=(result.failure or "").strip().rpartition("\n")[2],
        launches=launches.total if launches else None,
    )


def _phases(profile: MemoryProfile) -> tuple[PhasePeak, ...]:
    launches = {name: counted.total for name, counted in profile.launches.items()}
    return tuple(
        PhasePeak(name, peak.allocated, peak.reserved, peak.device, launches.get(name))
        for name, peak in profile.phases.items()
    )


def _phase(name: str) -> Column[Case]:
    return Column(name, lambda case: Cell.known_gib(sum(each.allocated for each in case.phases if each.name == name)))


_COLUMNS: tuple[Column[Case], ...] = (
    Column("recipe", lambda case: Cell(case.recipe)),
    Column("card", lambda case: Cell(case.device)),
    Column("r", lambda case: Cell.count(case.lora_r)),
    Column(
        "targets",
        lambda case: Cell(case.target_modules.replace(" ", ", ")),
        page_cell=lambda case: Cell(case.target_modules),
    ),
    Column("seq", lambda case: Cell(str(case.max_seq_length)), page_cell=lambda case: Cell.count(case.max_seq_length)),
    Column("batch", lambda case: _batch(case, "x"), page_cell=lambda case: _batch(case, "×")),
    Column("ckpt", lambda case: Cell("yes" if case.gradient_checkpointing else "no"), "checkpointing"),
    Column("loss", lambda case: Cell(case.loss)),
    *map(_phase, ("load", "first step", "steady")),
    Column("allocated", lambda case: Cell.known_gib(case.peak.allocated)),
    Column("floor", lambda case: Cell.known_gib(case.floor_bytes)),
    Column("x floor", lambda case: Cell.times_floor(case.peak.allocated, case.floor_bytes)),
    Column("reserved", lambda case: Cell.known_gib(case.peak.reserved)),
    Column("on the card", lambda case: Cell.known_gib(case.peak.device)),
    launches_column("launches a step", lambda case: case.launches),
    Column("verdict", lambda case: Cell(_reason(case)), page_cell=lambda case: _verdict(case)),
)


def _batch(case: Case, times: str) -> Cell:
    return Cell(f"{case.batch_size} {times} {case.gradient_accumulation_steps}")


def _verdict(case: Case) -> Cell:
    if case.fits:
        return Cell("fits", tone="good")
    return Cell("does not fit" if case.out_of_memory or case.peak.device else "failed", tone="bad")


def _reason(case: Case) -> str:
    if case.fits:
        return "fits"
    if case.peak.device:
        return f"does not fit: needs {gib(case.peak.device)}"
    return "does not fit: out of memory" if case.out_of_memory else f"failed: {case.failure}"


def _where_known(column: Column[Case]) -> Column[Case]:
    """The column, blank for cases without peaks."""
    return replace(column, cell=lambda case: column.cell(case) if case.peak.device else Cell(""))


def write_matrix(folder: Path, results: Sequence[CaseResult], record: dict[str, Any], name: str = "matrix") -> str:
    """Write the table of `results` under `folder` as JSON, Markdown and CSV, with its provenance; returns it, short."""
    cases = [_case(result) for result in results]
    model = model_names(result.recipe.base.model for result in results)
    text = (
        f"{model}, peaks in GiB: allocated (by phase, then overall), reserved, and what the card must hold with the "
        f"CUDA context. {FLOOR_TEXT} A recipe that does not fit is run again where it has room, on a virtual card of "
        "the same kind with room for it or on the real one without a cap: its figures are what it would need."
    )
    columns = [*_COLUMNS[:2], *map(_where_known, _COLUMNS[2:-1]), _COLUMNS[-1]]
    markdown = markdown_page(record["device"], (text, markdown_of(columns, cases, text_columns=2)), record)
    rows = [{k: v for k, v in plain_row(case).items() if k not in ("phases", "failure")} for case in cases]
    whole = [row | {"phases": [asdict(each) for each in case.phases]} for row, case in zip(rows, cases, strict=True)]
    head = {"device": record["device"], "provenance": record["provenance"], "model": model}
    content = {"environment": record, **head, "cases": whole}
    write_result(folder, name, content, markdown, rows)
    return readme_table(cases)


@dataclass(frozen=True)
class _File(Cases[Case]):
    model: str = ""


_read = partial(read_as, _File)


# What is asked for first stands first: a narrow screen shows few columns at a time.
_PAGE = (
    *("recipe", "card", "verdict", "on the card", "reserved", "allocated", "floor", "x floor", "launches a step"),
    *("load", "first step", "steady", "seq", "batch", "r", "targets", "ckpt", "loss"),
)
_README = (
    *("recipe", "seq", "ckpt", "loss", "allocated", "floor", "x floor", "reserved", "on the card", "launches a step"),
    "verdict",
)


def _chosen(headings: Sequence[str]) -> list[Column[Case]]:
    by_heading = {column.heading: column for column in _COLUMNS}
    return [by_heading[heading] for heading in headings]


def _section(provenance: kinds.Provenance, file: _File) -> Section:
    cases = file.cases
    fitting = sum(case.fits for case in cases)
    one_card = len({case.device for case in cases}) == 1
    columns = _chosen([heading for heading in _PAGE if not (one_card and heading == "card")])
    return Section(
        name="matrix",
        title="The benchmark matrix",
        text="Peaks in GiB: allocated by phase, then overall, reserved, and what the card must hold with the CUDA "
        "context. A recipe that does not fit ran on a card of the same kind with room for it: its figures are what it "
        "would need.",
        tables=(page_table("Peaks in GiB by recipe", columns, cases),),
        highlights=((f"{fitting} of {len(cases)}", f"recipes fit on {provenance.device}"),),
        model=file.model,
    )


KIND = Kind("a matrix (pytest bench/)", has_rows("cases", "recipe_hash", "fits"), _read, each_its_own(_section))


def readme_table(cases: Sequence[Case]) -> str:
    """The matrix as a short Markdown table."""
    recipe, seq, ckpt, *others, _ = _chosen(_README)
    first = replace(recipe, cell=lambda case: Cell(f"`{case.recipe}`"))
    columns = [first, seq, replace(ckpt, heading="checkpointing"), *others, Column("verdict", _verdict)]
    return markdown_of(columns, cases)


def readme_block(content: dict[str, Any]) -> str:
    """Table and provenance of a `matrix.json`, as in the README. Raises ValueError: what is wrong with it."""
    record, file = content["environment"], _read(content)
    return (
        f"{file.model} on `{record['device']}`, peaks in GiB. {FLOOR_TEXT}\n\n"
        f"{readme_table(file.cases)}\n\n"
        f"{provenance_lines(record)} A recipe that does not fit ran on a card of the same kind with room for it; its "
        "row says what it would need. All tables: [`results/`](results/).\n"
    )
