"""The command on a virtual card: the peaks it prints, and what it says when a job does not fit."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import RECIPES, TINY_HYBRID
from qlora_lowmem.memory.profile import read_live
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.recipe_runs import submit_recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.virtual_gpu import Server, get_card

Command = Callable[..., subprocess.CompletedProcess[str]]
OPTIMISED = ("--config", str(RECIPES / "optimised.yaml"), "--weights", "random", "--device", "virtual")


def test_peaks_of_a_tiny_model(command: Command, tiny_hybrid: Path, tmp_path: Path, recipe_runs: Server) -> None:
    arguments = [*OPTIMISED, "--model", str(tiny_hybrid), "--max-seq-length", "64", "--json", "-"]
    arguments += ["--output-dir", str(tmp_path)]
    run = command("train", *arguments, "--card", "rtx-3060-laptop-6gb")
    assert run.returncode == 0, run.stderr
    content = json.loads(run.stdout)
    assert (content["device"], content["provenance"]) == ("rtx-3060-laptop-6gb", "virtual")
    assert 0 < content["peak_allocated_bytes"] <= content["peak_reserved_bytes"] < content["peak_device_bytes"]
    assert [phase["name"] for phase in content["phases"]] == ["load", "first step", "steady"]
    assert "final_loss" not in content, "a virtual GPU computes no loss"
    # The same from all of its micro-batches, of which the command leaves out those that show nothing new.
    recipe = load_recipe(RECIPES / "optimised.yaml", {"model": str(tiny_hybrid), "max_seq_length": 64})
    whole = submit_recipe(recipe_runs, recipe, get_card("rtx-3060-laptop-6gb")).result().profile
    assert whole is not None
    assert content["phases"] == whole.to_dict()["phases"]
    assert whole.step_launches is not None
    assert content["launches"]["steady"] == vars(whole.step_launches)
    # Eight micro-batches, of which the first need not add to gradients; clipping and the optimizer.
    assert content["micro_batch_launches"]["kernels"] * 7 < content["launches"]["steady"]["kernels"]
    # What the watch would have seen last: the same peaks, though the recorder began anew at each step.
    live = read_live(tmp_path)
    assert (live.phase, live.outcome, live.step) == ("ended", "done", 2)
    assert live.peak_allocated == content["peak_allocated_bytes"]
    assert live.peak_reserved == content["peak_reserved_bytes"]
    assert live.outside == content["outside_allocator_bytes"]
    # A percentage is a real cap: 8 % of 6 GiB is less than the CUDA context and the workspaces.
    capped = command("train", *arguments, "--max-memory", "8%", "--no-advice")
    assert capped.returncode == 3
    content = json.loads(capped.stdout)
    assert content["fits"] is False
    assert (content["environment"]["device"], content["environment"]["provenance"]) == (content["device"], "virtual")
    assert read_live(tmp_path).outcome == "out of GPU memory"


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_told_what_would_help(command: Command, tmp_path: Path) -> None:
    """Full logits of 100,352 values on 6 GB, then the knobs that the run proposes."""
    settings = architecture("granite-4.0-h-350m") | TINY_HYBRID | {"vocab_size": 100352}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    big = ["--model", str(tmp_path), "--max-seq-length", "2048", "--batch-size", "8", "--loss", "full"]
    big += ["--gradient-accumulation-steps", "1", "--output-dir", str(tmp_path / "out")]
    run = command("train", *OPTIMISED, *big, "--json", "-")
    assert run.returncode == 3, run.stderr
    assert "CUDA out of memory. Tried to allocate" in run.stderr
    content = json.loads(run.stdout)
    knobs = content["advice"]["knobs"]
    assert knobs == sorted(knobs, key=lambda knob: -knob["saves_bytes"])
    best = knobs[0]
    assert best["change"] == "--loss fused --lean true"
    assert best["fits"]
    # What the advice says is what the changed recipe takes.
    changed = command("train", *OPTIMISED, *big, *best["change"].split(), "--json", "-", "--quiet")
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)["peak_device_bytes"] == best["peak_device_bytes"]
