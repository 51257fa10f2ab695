"""Training runs: the peaks by phase of what `train --json` says of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.kinds import Fields, Kind, Section, Source, named_by_file
from qlora_lowmem.results.kinds.phases import PhaseBytes, chart_of, phase_bytes, tables_of
from qlora_lowmem.results.tables import FLOOR_TEXT, usable_bytes


@dataclass(frozen=True)
class _Run:
    """A run's recipe by name, empty where it has none, and its phases."""

    recipe: str
    phases: tuple[PhaseBytes, ...]


def _recognises(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("recipe"), dict) and isinstance(content.get("phases"), list)


def _read(content: Fields) -> _Run:
    """The phases of a `train --json`, and where memory ran out if it did."""
    ran_out = {}
    if content.raw.get("failure") is not None:
        failure = content.object("failure")
        ran_out = {failure.text("phase"): failure.text("message")}
    budget = usable_bytes(content.text("device")) or content.count("total_bytes")
    if not budget:
        raise ValueError("total_bytes is 0")
    name = content.object("recipe").raw.get("name")
    floor = 0 if ran_out else content.count("floor_bytes")
    phases = phase_bytes(content.phases("phases"), budget, out_of_memory=ran_out, floor=floor)
    return _Run(name if isinstance(name, str) else "", phases)


def _sections(found: Sequence[tuple[Source, _Run]]) -> list[Section]:
    """One section for all runs, side by side."""
    names = named_by_file([(source, run.recipe) for source, run in found])
    lives = {name: run.phases for name, (_, run) in zip(names, found, strict=True)}
    return [
        Section(
            name="runs",
            title="Training runs by phase",
            text="What the card held in each phase of a training run. The dashed line is what a job can use on the "
            f"card; of a card that this project has no figures of, all that it has. {FLOOR_TEXT}",
            charts=(chart_of("runs", lives, whole=False),),
            tables=tables_of(lives),
            sources=tuple(source for source, _ in found),
        )
    ]


KIND = Kind("a training run (train --json)", _recognises, _read, _sections)
