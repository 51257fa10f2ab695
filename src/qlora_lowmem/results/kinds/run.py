"""Training runs: the peaks by phase of what `train --json` says of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.files import Count
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results.kinds import Kind, Section, together
from qlora_lowmem.results.kinds.phases import PhaseBytes, chart_of, phase_bytes, tables_of
from qlora_lowmem.results.reading import PhasePeak, Rows, read_as
from qlora_lowmem.results.subject import Said, model_names, subject
from qlora_lowmem.results.tables import FLOOR_TEXT, usable_bytes


@dataclass(frozen=True)
class _Failure:
    phase: str
    message: str


@dataclass(frozen=True)
class _File:
    device: str
    recipe: Said
    phases: Rows[PhasePeak]
    total_bytes: Count
    floor_bytes: Count | None = None
    failure: _Failure | None = None


@dataclass(frozen=True)
class _Told:
    """Phases, and what their run is of; where memory ran out too, if it did."""

    recipe: Said
    device: str
    phases: tuple[PhaseBytes, ...]


def _read(content: Mapping[str, Any]) -> tuple[str, _Told]:
    """With the recipe's name, empty where it has none."""
    file = read_as(_File, content)
    budget = usable_bytes(file.device) or file.total_bytes
    if not budget:
        raise ValueError("total_bytes is 0")
    ran_out = {file.failure.phase: file.failure.message} if file.failure else {}
    if not ran_out and file.floor_bytes is None:
        raise ValueError("floor_bytes is missing")
    peaks = {each.name: Peak(each.allocated, each.reserved, each.device) for each in file.phases}
    floor = 0 if ran_out else file.floor_bytes or 0
    launches = {each.name: each.launches for each in file.phases}
    phases = phase_bytes(peaks, budget, out_of_memory=ran_out, floor=floor, launches=launches)
    return file.recipe.name or "", _Told(file.recipe, file.device, phases)


def _section(runs: Sequence[tuple[str, _Told]]) -> Section:
    lives = {name: told.phases for name, told in runs}
    of = dict.fromkeys(subject(told.recipe.model, told.recipe.length, on=told.device) for _, told in runs)
    return Section(
        name="runs",
        title="Training runs by phase",
        text="What the card held in each phase of a training run. The dashed line is what a job can use on the card; "
        f"of a card that this project has no figures of, all that it has. {FLOOR_TEXT}",
        charts=(chart_of("runs", "; ".join(of), lives, whole=False),),
        tables=tables_of(lives),
        model=model_names(told.recipe.model for _, told in runs),
    )


KIND = Kind(
    "a training run (train --json)",
    lambda content: isinstance(content.get("recipe"), dict) and isinstance(content.get("phases"), list),
    _read,
    together(_section),
)
