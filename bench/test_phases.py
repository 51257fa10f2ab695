"""Every phase of a run's life on a 6 GB card: load, first step, steady, evaluate, save, resume, merge."""

from pathlib import Path

import pytest
import yaml

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.profile import PHASES, Peak
from qlora_lowmem.plan.questions import Life, live
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.phases import write_phases
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.units import format_bytes, parse_bytes

pytestmark = pytest.mark.phases
CARD = virtual_gpu.get_card("rtx-4050-laptop-6gb")
ON_THE_CARD = parse_bytes("6 GB")
BUDGETS: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "phase-budgets.yaml").read_text())
ABOUT = (
    "From a checkpoint of Granite-4.0-H-1B at full size: loaded in 4 bits, the longest batch tried, two steps with an "
    "evaluation and a checkpoint after each, gone on from the first checkpoint in another process, merged into the "
    "16-bit weights in a third."
)
CASES = [(name, phase) for name in BUDGETS for phase in PHASES]


@pytest.fixture(scope="module")
def lives(results_folder: Path) -> dict[str, Life]:
    """Each recipe's life; the table is written whatever the verdicts."""
    with recipe_server(max_workers=1) as server:
        found = {name: live(load_recipe(RECIPES / f"{name}.yaml"), CARD, server) for name in BUDGETS}
    _write(results_folder / CARD.name, found)
    return found


def _peak(life: Life, phase: str) -> Peak:
    return life.profile.phases[phase]


def _write(folder: Path, lives: dict[str, Life]) -> None:
    budgets = {name: {phase: parse_bytes(size) for phase, size in found.items()} for name, found in BUDGETS.items()}
    phases = {name: life.phases(ON_THE_CARD, budgets[name]) for name, life in lives.items()}
    model = model_names(life.recipe.base.model for life in lives.values())
    write_phases(folder, model, phases, provenance_record(CARD.name, "virtual"), ABOUT)


@pytest.mark.parametrize(("name", "phase"), CASES, ids=[f"{name}-{phase}" for name, phase in CASES])
def test_a_phase_stays_under_its_budget(lives: dict[str, Life], name: str, phase: str) -> None:
    assert not lives[name].out_of_memory
    peak = _peak(lives[name], phase)
    budget = BUDGETS[name][phase]
    assert peak.allocated <= parse_bytes(budget), f"{format_bytes(peak.allocated, budget)} is over {budget}"
    assert peak.device <= ON_THE_CARD


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_is_the_peak_of_a_life(lives: dict[str, Life], name: str) -> None:
    """Whoever trains there can do all the rest, and the warm-up has seen what a forward and backward take."""
    steady = _peak(lives[name], "steady")
    for phase in ("load", "resume", "warm-up", "evaluate", "save", "merge"):
        assert _peak(lives[name], phase).allocated <= steady.allocated, phase
    assert _peak(lives[name], "warm-up").allocated > _peak(lives[name], "evaluate").allocated
