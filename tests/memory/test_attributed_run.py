"""A training job attributed on a virtual GPU: every byte of its peak, and not a byte more than without."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import msgspec
import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.plan.recipe_runs import submit_recipe
from qlora_lowmem.recipe.io import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("built")]

SMALL = {"max_seq_length": "64", "gradient_accumulation_steps": "3", "lora_r": "4"}


def test_kinds_sum_and_peaks_stay(recipe_runs: virtual_gpu.Server, tiny_hybrid: Path) -> None:
    changes = [
        {},
        {"gradient_checkpointing": "false", "loss": "full"},
        {"max_steps": "1"},
        {"expandable_segments": "true", "gradient_accumulation_steps": "1"},
    ]
    recipes = [
        load_recipe(RECIPES / "optimised.yaml", SMALL | {"model": str(tiny_hybrid)} | change) for change in changes
    ]
    card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
    plain = [submit_recipe(recipe_runs, recipe, card) for recipe in recipes]
    asked = [submit_recipe(recipe_runs, recipe, card, attribute=True) for recipe in recipes]
    runs = [(one.result(), other.result()) for one, other in zip(plain, asked, strict=True)]

    for change, (without, attributed) in zip(changes, runs, strict=True):
        assert attributed.failure is None, attributed.failure
        assert without.profile == attributed.profile, change
        assert without.attribution is None
        found = attributed.attribution
        assert found is not None
        assert found.phase == ("first step" if "max_steps" in change else "steady")
        phase = attributed.profile.phases[found.phase]
        assert (found.allocated_bytes, found.reserved_bytes) == (phase.allocated, phase.reserved)
        assert sum(found.kinds.values()) == found.device_bytes == phase.device
        assert found.faults == 0
        assert found.unexplained_share < 0.02, found.kinds
        assert found.kinds["libraries"] == 2 * 8_519_680  # one a thread (virtual-gpu.md), forward's and autograd's
        assert {"weights_4bit", "quantisation", "weights_other", "adapters"} <= found.kinds.keys()
    checkpointed, kept = runs[0][1].attribution, runs[1][1].attribution
    assert checkpointed is not None
    assert kept is not None
    assert "checkpoints" in checkpointed.kinds
    assert "checkpoints" not in kept.kinds
    assert not any(kind.startswith("recomputed") for kind in kept.timeline.kinds)


def test_command_writes_everything(
    tiny_hybrid: Path, tmp_path: Path, command: Callable[..., CompletedProcess[str]]
) -> None:
    files = {kind: tmp_path / f"peak.{kind}" for kind in ("json", "svg", "png", "markdown", "snapshot")}
    flags = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    small = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", value)]

    done = command("explain", "--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), *small, *flags)

    assert done.returncode == 0, done.stderr
    assert "**on the card**" in done.stdout
    content = json.loads(files["json"].read_text(encoding="utf-8"))
    found, floor = msgspec.convert(content["attribution"], Attribution), content["floor_bytes"]
    assert found.provenance == "virtual"
    assert 0 < floor < found.allocated_bytes
    assert f"allocated is {found.allocated_bytes / floor:.2f} times that." in done.stdout
    with files["snapshot"].open("rb") as file:
        snapshot = pickle.load(file)  # what we have just written
    assert {"segments", "device_traces"} <= snapshot.keys()
    assert all(path.stat().st_size for path in files.values())
