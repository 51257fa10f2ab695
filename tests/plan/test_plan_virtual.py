"""The command on virtual cards with a tiny model: what it says is what running its proposal shows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES, ROOT
from qlora_lowmem.plan.asked import planned_model
from qlora_lowmem.plan.kept_runs import RunCache, Runs
from qlora_lowmem.plan.maximum import room_left
from qlora_lowmem.plan.pair import Pair, Planner
from qlora_lowmem.plan.recipe_runs import submit_recipe, two_steps
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.virtual_gpu import Server, get_card

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]
CARD = "rtx-3060-laptop-6gb"


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, str]:
    """An empty cache of its own; what the virtual GPU has built stays where it is."""
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def cases(run: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(run.stdout)["cases"]
    return content


def test_the_best_for_a_model_is_written_and_trains(
    command: Command, tiny_hybrid: Path, tmp_path: Path, cached: dict[str, str]
) -> None:
    target = tmp_path / "mine.yaml"
    asked = ("--model", str(tiny_hybrid), "--card", CARD, "--seq", "256", "--limit", "512", "--write", str(target))
    run = command("plan", *asked, "--json", "-", **cached)
    assert run.returncode == 0, run.stderr
    content = json.loads(run.stdout)
    assert content["environment"]["command"].startswith("python -m qlora_lowmem.plan --model")
    (plan,) = content["cases"]
    proposal = plan["proposal"]
    assert (plan["fits"], proposal["rung"], proposal["flops_ratio"]) == (True, "fastest", 1.0)
    assert (proposal["longest"]["value"], proposal["longest"]["limited_by"]) == (512, "limit")
    assert sum(proposal["kinds"].values()) == proposal["need"]["device_bytes"]

    written = load_recipe(target)
    assert written.to_dict()["batch"] == proposal["recipe"]["batch"]
    assert written.run.output_dir == "outputs/mine"
    alone = command("train", "--config", str(target), "--device", "virtual", "--weights", "random", "--json", "-")
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["peak_device_bytes"] == proposal["need"]["device_bytes"]

    again = command("plan", *asked, "--force", **cached)
    assert again.returncode == 0, again.stderr
    assert f"Answered from the cache (all {plan['runs']} runs" in again.stdout
    assert "fits at 256 tokens" in again.stdout
    assert "longest sequence 512 tokens (no longer one was tried" in again.stdout


def test_of_a_model_on_the_hub_what_is_written_runs_as_it_is_said(
    command: Command, tmp_path: Path, cached: dict[str, str], hub: dict[str, str]
) -> None:
    """A model that is not shipped: plan and train take its config.json from the hub alike, and no weights."""
    target = tmp_path / "mine.yaml"
    asked = ("--model", "someone/some-model", "--card", CARD, "--seq", "64", "--limit", "64", "--step", "64")
    run = command("plan", *asked, "--write", str(target), "--json", "-", **cached, **hub)
    assert run.returncode == 0, run.stderr
    said = run.stderr.split("Run it whole on the virtual card: ")[1]
    start, *arguments = said.split("python -m qlora_lowmem.")[1].split()
    assert (start, load_recipe(target).base.model) == ("train", "someone/some-model")
    alone = command(start, *arguments, "--json", "-", **hub)
    assert alone.returncode == 0, alone.stderr
    need = cases(run)[0]["proposal"]["need"]
    assert json.loads(alone.stdout)["peak_device_bytes"] == need["device_bytes"]
    never = command(start, *arguments, "--dry-run", **(hub | {"HF_HUB_CACHE": str(tmp_path / "empty")}))
    assert never.returncode == 2
    assert "config.json could not be fetched" in never.stderr
    assert "a local folder that holds config.json" in never.stderr


def test_a_recipe_that_does_not_fit_gets_one_that_does(tiny_hybrid: Path, recipe_runs: Server) -> None:
    """Sixteen sequences at once with full logits: one by one they fit, and the next longer step does not."""
    asked = {"model": str(tiny_hybrid), "max_seq_length": 2048, "batch_size": 16, "gradient_accumulation_steps": 1}
    recipe = replace_fields(load_recipe(RECIPES / "baseline.yaml"), asked)
    card = get_card(CARD)
    card = card.with_memory(card.total_bytes - card.usable_bytes + card.context_bytes + 200 * 2**20)
    runs = Runs(recipe_runs, RunCache(None))
    pair = Pair(planned_model(recipe), card, recipe.name, recipe_given=True, limit=8192, step=512, full=False)
    plan = Planner(pair, runs).plan()
    assert not plan.fits
    assert plan.need is not None
    assert plan.need.device_bytes > card.usable_bytes, "what it would need, from a card with room for it"
    proposal = plan.proposal
    assert proposal is not None
    batch = proposal.recipe.batch
    assert (batch.batch_size, batch.gradient_accumulation_steps, batch.max_seq_length) == (1, 16, 2048)
    # Everything again, from the proposed recipe alone.
    proposed = planned_model(proposal.recipe).recipe
    lengths = [2048, proposal.longest.value, proposal.longest.next_value]
    again = [
        submit_recipe(recipe_runs, two_steps(replace_fields(proposed, {"max_seq_length": length})), card)
        for length in lengths
    ]
    left = [room_left(run.result(), card, "again") for run in again]
    assert [room >= 0 for room in left] == [True, True, False]
    assert left[0] == card.usable_bytes - proposal.need.device_bytes


def test_a_sweep_goes_on_where_it_was_interrupted(
    command: Command, tiny_hybrid: Path, tmp_path: Path, cached: dict[str, str]
) -> None:
    asked = ["--model", str(tiny_hybrid), "--card", CARD, "rtx-3050-6gb", "--seq", "256", "--limit", "512"]
    environment = {**os.environ, **cached, "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "qlora_lowmem.plan", *asked],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    kept = tmp_path / "cache" / "qlora_lowmem" / "plan"
    deadline = time.monotonic() + 120
    while not list(kept.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert said.rstrip().endswith("interrupted")
    before = len(list(kept.rglob("*.json")))
    assert before
    run = command("plan", *asked, "--json", "-", **cached)
    assert run.returncode == 0, run.stderr
    plans = cases(run)
    assert [plan["card"] for plan in plans] == [CARD, "rtx-3050-6gb"]
    assert sum(plan["cached"] for plan in plans) == before
    assert [plan["knobs"] for plan in plans] == [[], []], "without --full, a sweep looks for proposals alone"
    for plan in plans:
        assert plan["proposal"]["need"]["device_bytes"] <= get_card(plan["card"]).usable_bytes


def test_a_pipe_has_the_first_verdict_while_other_runs_are_made(tiny_hybrid: Path, cached: dict[str, str]) -> None:
    asked = [
        "--config",
        str(RECIPES / "optimised.yaml"),
        "--model",
        str(tiny_hybrid),
        "--card",
        CARD,
        "--limit",
        "2048",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_lowmem.plan", *asked],
        cwd=ROOT,
        env={**os.environ, **cached, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        runs = list(Path(cached["XDG_CACHE_HOME"]).rglob("*.json"))
        rest = process.stdout.read()
    assert process.returncode == 0
    assert re.match(r"optimised, \S+ at 1,024 tokens on rtx-3060-laptop-6gb: fits, with [\d.]+ GiB of room", first)
    made = re.search(r"(\d+) runs, in", rest)
    assert made is not None
    assert len(runs) < int(made[1]) / 2
