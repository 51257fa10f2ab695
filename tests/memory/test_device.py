"""A measured GPU as a virtual card: the virtual GPU is the GPU here, so a twin of it must be itself."""

import json
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.gate.cases import VirtualRunner
from qlora_lowmem.memory import device
from qlora_lowmem.memory.device import DeviceProperties, properties_of_this_machine, virtual_twin
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult
from qlora_lowmem.results.kinds.prediction import compare, misses

BLACKWELL_LAPTOP = DeviceProperties(
    title="NVIDIA GeForce RTX 5060 Laptop GPU",
    total_bytes=8_146_000_000,
    compute_capability=(12, 0),
    sm_count=26,
    l2_bytes=33_554_432,
    threads_per_sm=1536,
    shared_per_sm=102_400,
    shared_per_block_optin=101_376,
)


def _asked_on(card: virtual_gpu.Card, folder: Path) -> DeviceProperties:
    with (folder / "properties.json").open("w+") as file:
        report = virtual_gpu.run([sys.executable, "-m", "qlora_lowmem.memory.device"], card, stdout=file)
        assert report.exit_code == 0
        file.seek(0)
        return msgspec.json.decode(file.read(), type=DeviceProperties)


@pytest.mark.parametrize("name", ["rtx-2060-6gb", "rtx-4050-laptop-6gb", "h100-80gb"])
def test_a_card_of_the_table_is_its_own_twin(name: str, tmp_path: Path) -> None:
    card = virtual_gpu.get_card(name)
    twin = virtual_twin(_asked_on(card, tmp_path), card.context_bytes)
    assert replace(twin, usable_bytes=card.usable_bytes) == card
    assert twin.usable_bytes == card.total_bytes


def test_a_gpu_that_is_in_no_table_is_what_torch_says(tmp_path: Path) -> None:
    twin = virtual_twin(BLACKWELL_LAPTOP, 400 * 2**20)
    assert _asked_on(twin, tmp_path) == BLACKWELL_LAPTOP
    assert twin.context_bytes == 400 * 2**20
    assert "measured" in twin.sources["context_bytes"]
    assert BLACKWELL_LAPTOP.title in twin.sources["sm_count"]


def test_the_nearest_card_is_of_the_same_generation_and_then_of_the_nearest_memory() -> None:
    ada = replace(BLACKWELL_LAPTOP, compute_capability=(8, 9))
    assert virtual_twin(replace(ada, total_bytes=6 * 10**9), 1).name == "rtx-4050-laptop-6gb"
    assert virtual_twin(replace(ada, total_bytes=8 * 10**9), 1).name == "rtx-4060-8gb"
    assert virtual_twin(replace(ada, total_bytes=48 * 10**9), 1).name == "l40s-48gb"
    assert virtual_twin(replace(ada, compute_capability=(8, 0), total_bytes=80 * 10**9), 1).name == "a100-80gb"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: Found no NVIDIA driver on your system.")
    monkeypatch.setattr(device.subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(UsageError, match=r"--gpu needs a GPU that torch can use.*Found no NVIDIA driver"):
        properties_of_this_machine()


def test_properties_come_back_from_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = subprocess.CompletedProcess([], 0, json.dumps(asdict(BLACKWELL_LAPTOP)), "")
    monkeypatch.setattr(device.subprocess, "run", lambda *_args, **_kwargs: answered)
    assert properties_of_this_machine() == BLACKWELL_LAPTOP


@pytest.mark.slow
def test_a_prediction_for_a_twin_is_exact(recipe_runs: virtual_gpu.Server, tiny_hybrid: Path, tmp_path: Path) -> None:
    """A virtual run in the place of the measured one: its twin must need the same, to the byte."""
    changes = {"model": str(tiny_hybrid), "max_seq_length": 128, "gradient_accumulation_steps": 2}
    recipe = load_recipe(RECIPES / "optimised.yaml", changes)
    card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
    stands_in = _profile(VirtualRunner(recipe_runs, card).submit(recipe))
    twin = virtual_twin(_asked_on(card, tmp_path), stands_in.outside_allocator_bytes)
    predicted = _profile(VirtualRunner(recipe_runs, twin).submit(recipe))
    figures = compare("tiny", predicted, stands_in)
    assert {figure.phase for figure in figures} > {"load", "first step", "steady"}
    assert [figure.error for figure in figures] == [0.0] * len(figures)
    assert misses(figures) == []


def _profile(run: "Future[CaseResult]") -> MemoryProfile:
    result = run.result()
    assert result.profile is not None, result.failure
    return result.profile
