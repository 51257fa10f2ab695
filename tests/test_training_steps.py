"""The timed step, on the virtual GPU: that it is the trainer's step, and that memory comes back; no times."""

import csv
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.plan.recipe_runs import submit_recipe
from qlora_lowmem.recipe.io import load_recipe
from speed_table import Speed, write_speed

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": False, "loss": "full"}], ids=["checkpointing", "full-logits"]
)
def test_a_timed_step_is_the_trainers_step(
    recipe_runs: virtual_gpu.Server, tiny_hybrid: Path, changes: dict[str, object]
) -> None:
    """Its peaks are those of the same job under the trainer's own loop; only that one keeps a sum of losses."""
    settings = {"model": str(tiny_hybrid), "max_seq_length": 256, "gradient_accumulation_steps": 2} | changes
    recipe = load_recipe(RECIPES / "optimised.yaml", settings)
    card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
    by_the_trainer = submit_recipe(recipe_runs, recipe, card)
    kwargs = {"content": recipe.to_dict(), "steps": 5}
    done = recipe_runs.submit("training_steps:peaks_of_steps", kwargs, card, timeout=300).result()
    profile = by_the_trainer.result().profile
    assert done.value is not None, done.output_tail
    assert profile is not None
    assert (done.value["steps"], done.value["tokens"]) == (5, 2 * 256)
    first, *steady = done.value["peaks"]
    by_phase = {name: peak.allocated for name, peak in profile.phases.items()}
    assert abs(first - by_phase["first step"]) <= 4096
    assert all(abs(peak - by_phase["steady"]) <= 4096 for peak in steady)
    # What stays is what the libraries keep for the process: two cuBLAS workspaces and a few tables.
    assert done.value["left"] < 2 * 8_519_680 + MIB


def test_speed_is_by_the_median_step(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "optimised.yaml")
    speed = Speed.of(recipe, 8192, [2.0, 1.0, 9.0])
    assert (speed.median_seconds, speed.fastest_seconds, speed.slowest_seconds, speed.steps) == (2.0, 1.0, 9.0, 3)
    assert speed.tokens_per_second == 4096
    write_speed(tmp_path, [speed], provenance_record("a-gpu", "measured", "580.1"))
    with (tmp_path / "speed.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["recipe"], row["tokens_per_second"]) == ("optimised", "4096.0")
    assert "Figures are **measured** on `a-gpu`" in (tmp_path / "speed.md").read_text()
    with pytest.raises(ValueError, match="no step was timed"):
        Speed.of(recipe, 8192, [])
