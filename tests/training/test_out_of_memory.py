"""Memory that runs out at any moment, on a virtual card: real errors of PyTorch's allocator."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.memory.profile import PHASES
from qlora_lowmem.plan.questions import live
from qlora_lowmem.recipe.io import load_recipe, replace_field
from tiny_chat import write_tiny_chat

pytestmark = pytest.mark.slow
Command = Callable[..., subprocess.CompletedProcess[str]]
CARD = virtual_gpu.get_card("rtx-4050-laptop-6gb")


def content(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Seven short samples and, sixth in the order of this seed, one of 2,000 tokens whose scores alone take 61 MiB."""
    model = write_tiny_chat(tmp_path / "model")
    rows = [{"text": "a b c " * 5} for _ in range(7)] + [{"text": "<|im_start|>" * 1999}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"model": str(model), "weights": "pretrained", "data": str(tmp_path / "data.jsonl"), "device": "virtual"}
    small |= {"max_seq_length": 2048, "gradient_accumulation_steps": 1, "max_steps": 8, "save_steps": 50}
    small |= {"attention": "eager", "loss": "full", "load_in_4bit": False, "lora_dropout": 0.1, "max_memory": "500 MiB"}
    return load_recipe(RECIPES / "optimised.yaml", small | changes | {"output_dir": str(tmp_path / "run")}).to_dict()


def train(recipe_runs: virtual_gpu.Server, **arguments: Any) -> dict[str, Any]:
    done = recipe_runs.submit("training.virtual_jobs:train", arguments, CARD).result()
    assert done.value is not None, done.output_tail
    found: dict[str, Any] = done.value
    return found


def test_a_job_that_will_not_fit_fails_before_its_first_step(recipe_runs: virtual_gpu.Server, tmp_path: Path) -> None:
    found = train(recipe_runs, content=content(tmp_path), warm_up=True)
    assert found == {"phase": "warm-up", "checkpoint": None}


def test_the_last_good_step_is_saved_and_gone_on_from_with_another_knob(
    recipe_runs: virtual_gpu.Server, tmp_path: Path
) -> None:
    recipe = content(tmp_path)
    found = train(recipe_runs, content=recipe)
    assert found["phase"] == "steady"
    step = int(found["checkpoint"].removeprefix("checkpoint-"))
    assert step > 0
    recipe["base"]["attention"] = "sdpa"
    again = train(recipe_runs, content=recipe, resume=True)
    assert again["steps"] == 8
    assert again["phases"].keys() == {"load", "resume", "first step", "steady", "save"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_warm_up_sees_what_a_steady_step_takes(
    recipe_runs: virtual_gpu.Server, tmp_path: Path, accumulation: int
) -> None:
    """With workspaces, gradients and the optimizer's state; that it is held as one block saves some rounding."""
    changes = {"max_memory": "100%", "gradient_accumulation_steps": accumulation, "attention": "sdpa"}
    recipe = content(tmp_path, **changes)
    phases = train(recipe_runs, content=recipe, warm_up=True)["phases"]
    assert phases["warm-up"] == pytest.approx(phases["steady"], rel=0.01)


def test_a_life_has_every_phase(recipe_runs: virtual_gpu.Server, tiny_hybrid: Path) -> None:
    recipe = load_recipe(RECIPES / "lean.yaml", {"model": str(tiny_hybrid), "max_seq_length": 64, "device": "virtual"})
    found = live(recipe, CARD, recipe_runs)
    assert list(found.profile.phases) == list(PHASES)
    assert found.fits(CARD)
    small = live(replace_field(recipe, "max_memory", "460 MiB"), CARD, recipe_runs)
    assert list(small.out_of_memory) == ["warm-up"]
    assert not small.fits(CARD)


def test_the_retreat_starts_again_with_another_knob(tmp_path: Path, command: Command) -> None:
    content(tmp_path)
    flags = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tmp_path / "model"), "--weights", "pretrained"]
    flags += ["--data", str(tmp_path / "data.jsonl"), "--device", "virtual", "--card", CARD.name]
    flags += ["--max-seq-length", "2048", "--gradient-accumulation-steps", "1", "--max-steps", "8", "--retreat"]
    flags += ["--attention", "eager", "--expandable-segments", "--no-load-in-4bit", "--max-memory", "620 MiB"]
    run = command("train", *flags, "--quiet", "--json", "-")
    assert run.returncode == 0, run.stderr
    steps = [line for line in run.stderr.splitlines() if line.startswith("retreat: ")]
    assert steps == ["retreat: --attention auto; starting again from the beginning"]
    assert json.loads(run.stdout)["recipe"]["base"]["attention"] == "auto"
