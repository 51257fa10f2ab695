"""Memory that runs out outside PyTorch's allocator: recognised by its words, told apart by its place, exit code 3."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import DoesNotFitError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run import execute as executing
from qlora_lowmem.run.out_of_memory import (
    OutOfGpuMemoryError,
    OutOfHostMemoryError,
    first_words,
    whose_memory,
)
from qlora_lowmem.run.preflight import inputs_of
from tiny_chat import write_tiny_chat

CUDA = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/ for more "
    "information.\nCUDA kernel errors might be asynchronously reported at some other API call."
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"

KINDS: list[tuple[Exception, str | None]] = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "card"),
    (torch.AcceleratorError(CUDA), "card"),
    (RuntimeError(CUDA), "card"),
    (RuntimeError(CUBLAS), "card"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "card"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "card"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), "host"),
    (RuntimeError(f"Caught AcceleratorError in pin memory thread for device 0.\n{CUDA}"), "host"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "host"),
    (MemoryError(), "host"),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), None),
    (RuntimeError("The size of tensor a (3) must match"), None),
    (ValueError(CUDA), None),
    (OSError(28, "No space left on device"), None),
]


@pytest.mark.parametrize(("error", "whose"), KINDS, ids=[str(error)[:40] for error, _ in KINDS])
def test_whose_memory_ran_out(error: Exception, whose: str | None) -> None:
    assert whose_memory(error) == whose


def runs_out(*_: int, **__: Any) -> torch.Tensor:
    """As torch.empty, where there is nothing left."""
    raise torch.AcceleratorError(CUDA)


def page_locked(empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    return empty(
        4,
        pin_memory=True,
    )


def on_the_card(empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    return empty(4, device="cuda")


@pytest.mark.parametrize(("make", "whose"), [(page_locked, "host"), (on_the_card, "card")])
def test_the_statement_tells_page_locked_memory_from_the_cards(make: Callable[..., Any], whose: str) -> None:
    """CUDA has the same words for both."""
    with pytest.raises(torch.AcceleratorError) as caught:
        make(runs_out)
    assert whose_memory(caught.value) == whose


def test_lean_checkpoints_in_host_memory_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_lowmem.lean.checkpointing import HostStore

    store = HostStore.__new__(HostStore)
    store._leaving, store._block, store._slots = None, None, 4
    monkeypatch.setattr(torch, "empty", runs_out)
    with pytest.raises(torch.AcceleratorError) as caught:
        store.put(0, torch.zeros(1))
    assert whose_memory(caught.value) == "host"


def test_the_first_words_are_on_one_line_and_without_advice() -> None:
    assert first_words(torch.AcceleratorError(CUDA)) == "CUDA error: out of memory"
    assert first_words(RuntimeError(CUBLAS)) == CUBLAS
    assert first_words(MemoryError()) == "MemoryError"


@pytest.fixture
def recipe(tiny_hybrid: Path, tmp_path: Path) -> Recipe:
    changes = {"model": str(tiny_hybrid), "device": "cpu", "max_seq_length": 32, "max_steps": 2, "pin_memory": True}
    return load_recipe(RECIPES / "optimised.yaml", changes | {"output_dir": str(tmp_path / "out")})


def failing(error: Exception) -> Callable[..., None]:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


class FakeRecorder:
    """As on a card, without one."""

    def __init__(self, running_phase: str = "steady") -> None:
        self.running_phase = running_phase

    def begin(self, name: str) -> None: ...
    def end(self) -> None: ...
    def profile(self) -> str:
        return "peaks"


@pytest.mark.parametrize("error", [torch.AcceleratorError(CUDA), RuntimeError(CUBLAS)], ids=["CUDA", "cuBLAS"])
def test_a_library_that_gets_no_memory_ends_the_run_as_torch_does(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from qlora_lowmem.recipe.io import replace_field

    monkeypatch.setattr(executing, "start_recorder", lambda _: FakeRecorder())
    monkeypatch.setattr(executing, "apply_memory_limit", lambda *_: 0)
    monkeypatch.setattr(executing, "build_job", failing(error))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(OutOfGpuMemoryError) as caught:
        executing.execute(inputs_of(replace_field(recipe, "device", "cuda")), output_dir=tmp_path)
    assert (caught.value.phase, caught.value.profile) == ("steady", "peaks")
    assert caught.value.torch_message == first_words(error)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_the_hosts_memory_is_told_apart(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(executing, "build_job", failing(error))
    with pytest.raises(OutOfHostMemoryError, match="not the card's") as caught:
        executing.execute(inputs_of(recipe), output_dir=tmp_path)
    assert caught.value.exit_code == 3
    assert "dataloader.pin_memory (set it to false)" in str(caught.value)


def test_another_failure_stays_what_it_is(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(executing, "build_job", failing(error))
    with pytest.raises(RuntimeError, match="illegal"):
        executing.execute(inputs_of(recipe), output_dir=tmp_path)


def test_before_and_after() -> None:
    from qlora_lowmem.run.before_after import _fits

    for error, said in ((torch.AcceleratorError(CUDA), "GPU memory"), (MemoryError(), "host memory")):
        with pytest.raises(DoesNotFitError, match=f"out of {said} while answering"), _fits("answering"):
            raise error
    with pytest.raises(RuntimeError, match="other"), _fits("answering"):
        raise RuntimeError("other")


def test_merge(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_lowmem.models import merging
    from qlora_lowmem.recipe.io import replace_fields
    from qlora_lowmem.run import merge

    pretrained = replace_fields(recipe, {"weights": "pretrained", "model": str(write_tiny_chat(tmp_path / "model"))})
    monkeypatch.setattr(merging.Adapter, "read", lambda *_: merging.Adapter({}, 1.0))
    monkeypatch.setattr(merge, "weights_folder", lambda *_: tmp_path / "model")
    monkeypatch.setattr(merge, "start_recorder", lambda _: FakeRecorder("merge"))
    monkeypatch.setattr(merge, "apply_memory_limit", lambda *_: 0)
    for error, kind in (
        (torch.AcceleratorError(CUDA), OutOfGpuMemoryError),
        (MemoryError(), OutOfHostMemoryError),
    ):
        monkeypatch.setattr(merging, "merge", failing(error))
        with pytest.raises(kind, match="merge"):
            merge.merge_run(pretrained, tmp_path, tmp_path / "merged", "bf16", "cuda")


# Takes a context, then runs the command given: two programs on one card.
HOLDER = (
    "import subprocess, sys, torch; torch.empty(1, device='cuda'); sys.exit(subprocess.run(sys.argv[1:]).returncode)"
)


@pytest.mark.slow
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another program"])
def test_a_card_without_room_for_the_context(tiny_hybrid: Path, tmp_path: Path, others: bool) -> None:
    """The context itself (AcceleratorError) beside another program; else the allocator's first block after it."""
    card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
    card = card.with_memory(card.context_bytes * 3 // 2 if others else card.context_bytes + 2**20)
    command = [sys.executable, "-m", "qlora_lowmem.train", "--config", str(RECIPES / "optimised.yaml"), "--no-advice"]
    command += ["--model", str(tiny_hybrid), "--device", "virtual", "--output-dir", str(tmp_path / "out")]
    with (tmp_path / "said").open("w") as said:
        launched = [sys.executable, "-c", HOLDER, *command] if others else command
        report = virtual_gpu.run(launched, card, env=os.environ | {"QLORA_LOWMEM_QUIET": "1"}, stderr=said)
    printed = (tmp_path / "said").read_text()
    assert report.exit_code == 3, printed
    assert "error: out of GPU memory before anything was loaded: the card has no room for a CUDA context" in printed
    assert "unexpected failure" not in printed
    assert json.dumps(printed).count("nvidia-smi") == 1
