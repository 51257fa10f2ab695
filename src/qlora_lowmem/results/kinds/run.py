"""Training runs: the peaks by phase of what `train --json` says of each."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_lowmem.results.kinds import Fields, Kind, Section, together
from qlora_lowmem.results.kinds.phases import PhaseBytes, chart_of, phase_bytes, tables_of
from qlora_lowmem.results.tables import FLOOR_TEXT, usable_bytes


def _recognises(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("recipe"), dict) and isinstance(content.get("phases"), list)


def _read(content: Fields) -> tuple[str, tuple[PhaseBytes, ...]]:
    """The recipe's name, empty where it has none, and the phases; where memory ran out too, if it did."""
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
    return name if isinstance(name, str) else "", phases


def _section(runs: Sequence[tuple[str, tuple[PhaseBytes, ...]]]) -> Section:
    lives = dict(runs)
    return Section(
        name="runs",
        title="Training runs by phase",
        text="What the card held in each phase of a training run. The dashed line is what a job can use on the card; "
        f"of a card that this project has no figures of, all that it has. {FLOOR_TEXT}",
        charts=(chart_of("runs", lives, whole=False),),
        tables=tables_of(lives),
    )


KIND = Kind("a training run (train --json)", _recognises, _read, together(_section))
