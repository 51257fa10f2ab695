"""Training runs: the peaks by phase of what `train --json` says of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.memory.profile import PHASES, Peak
from qlora_lowmem.results.kind import Fields, Kind, Section, Source
from qlora_lowmem.results.kinds.phases import PhaseBytes, chart_of, phase_bytes, tables_of
from qlora_lowmem.results.tables import FLOOR_TEXT, usable_bytes


@dataclass(frozen=True)
class Run:
    """A run's recipe by name, empty where it has none, and its phases."""

    recipe: str
    phases: tuple[PhaseBytes, ...]


def _recognises(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("recipe"), dict) and isinstance(content.get("phases"), list)


def _read(content: Fields) -> Run:
    """The phases of a `train --json`, and where memory ran out if it did."""
    peaks = {}
    for phase in content.objects("phases"):
        if phase.text("name") not in PHASES:
            raise ValueError(f"phases: {phase.text('name')!r} is not one of {', '.join(PHASES)}")
        sizes = phase.count("allocated"), phase.count("reserved"), phase.count("device")
        peaks[phase.text("name")] = Peak(*sizes)
    ran_out = {}
    if content.raw.get("failure") is not None:
        failure = content.object("failure")
        ran_out = {failure.text("phase"): failure.text("message")}
    budget = usable_bytes(content.text("device")) or content.count("total_bytes")
    if not budget:
        raise ValueError("total_bytes is 0")
    name = content.object("recipe").raw.get("name")
    floor = 0 if ran_out else content.count("floor_bytes")
    phases = phase_bytes(peaks, budget, out_of_memory=ran_out, floor=floor)
    return Run(name if isinstance(name, str) else "", phases)


def _sections(found: Sequence[tuple[Source, Run]]) -> list[Section]:
    """One section for all runs, side by side."""
    names = [run.recipe for _, run in found]
    lives = {}
    for source, run in found:
        stem = str(Path(source.file).with_suffix(""))
        name = stem if not run.recipe else f"{run.recipe} ({stem})" if names.count(run.recipe) > 1 else run.recipe
        lives[name] = run.phases
    return [
        Section(
            name="runs",
            title="Training runs by phase",
            text="What the card held in each phase of a training run. The dashed line is what a job can use on the "
            f"card; of a card that this project has no figures of, all that it has. {FLOOR_TEXT}",
            sources=tuple(source for source, _ in found),
            charts=(chart_of("runs", lives, missing=False),),
            tables=tables_of(lives),
        )
    ]


KIND = Kind("a training run (train --json)", _recognises, _read, _sections)
