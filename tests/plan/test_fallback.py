"""The order of the out-of-memory fallback, to its end."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from helpers import RECIPES
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.ladder import next_fallback
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run_folder.resumption import changes_between

Make = Callable[..., Recipe]


def steps(recipe: Recipe) -> list[str]:
    """Every fallback of a recipe; each keeps what is trained, as resuming sees it."""
    found = []
    while (step := next_fallback(recipe)) is not None:
        kept, foreign = changes_between(recipe.to_dict(), step.recipe)
        assert kept
        assert not foreign
        found.append(" ".join(step.flags))
        recipe = step.recipe
    return found


def test_what_costs_no_time_comes_first(tiny_recipe: Make) -> None:
    options = {"loss": "full", "attention": "eager", "gradient_checkpointing": False, "batch_size": 4}
    assert steps(tiny_recipe("run", device="cuda", **options)) == [
        "--expandable-segments true",
        "--loss fused",
        "--attention auto",
        "--gradient-checkpointing true",
        "--batch-size 2 --gradient-accumulation-steps 4",
        "--batch-size 1 --gradient-accumulation-steps 8",
        "--lean true",
        "--checkpoints host",
    ]


def test_a_knob_that_contradicts_another_is_passed_over(tiny_recipe: Make) -> None:
    """Offloaded activations and lean exclude each other."""
    assert steps(tiny_recipe("run", device="cuda", activation_offloading=True)) == ["--expandable-segments true"]


def test_released_gradients_leave_no_room_for_accumulation(tiny_recipe: Make) -> None:
    released = {"gradient_release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    recipe = tiny_recipe("run", device="cuda", batch_size=4, **released)
    assert steps(recipe) == ["--expandable-segments true", "--lean true", "--checkpoints host"]


def test_what_tiles_do_not_know_keeps_its_activations_in_host_memory(tiny_recipe: Make, tmp_path: Path) -> None:
    """Lean saves next to nothing there, and would leave no room for what does."""
    (tmp_path / "config.json").write_text(json.dumps(architecture("llama-3.2-3b") | {"hidden_act": "gelu"}))
    recipe = tiny_recipe("run", device="cuda", model=str(tmp_path))
    assert steps(recipe) == ["--expandable-segments true", "--activation-offloading true"]


def test_there_is_an_end(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("run", device="cuda", lean=True, checkpoints="host", expandable_segments=True)
    assert next_fallback(recipe) is None


def test_starting_again_is_the_same_command_with_the_change(tiny_hybrid: Path) -> None:
    """Its own process becomes the command; a dry run shows with what."""
    flags = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--dry-run", "--batch-size", "4"]
    step = ["--batch-size", "2", "--gradient-accumulation-steps", "4"]
    program = f"from qlora_lowmem.run.train import _start_again; _start_again({flags!r}, {step!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "batch_size: 2\n" in done.stdout
    assert "gradient_accumulation_steps: 4\n" in done.stdout
