"""The virtual GPU's side of the comparison: torch's own counters, and the same account kept of its CUDA tensors."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from qlora_lowmem.recipe.io import recipe_from_dict, replace_field
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of
from witness.ledger import Account
from witness.step import MICRO_BATCHES


def steady_counters(content: dict[str, Any]) -> dict[str, int]:
    """Run the recipe in this process, on its virtual GPU.

    Returns:
        Bytes: `allocated` and `requested` peaks of the last optimizer step (whole blocks, and what was asked for in
        them), and `peak`, the allocated peak of the whole run.
    """
    recipe = replace_field(recipe_from_dict(content), "device", "virtual")
    with tempfile.TemporaryDirectory() as folder:
        outcome = execute(inputs_of(recipe), output_dir=Path(folder), save=False)
    assert outcome.profile is not None
    statistics = torch.cuda.memory_stats()
    return {
        "allocated": statistics["allocated_bytes.all.peak"],
        "requested": statistics["requested_bytes.all.peak"],
        "peak": outcome.profile.peak.allocated,
    }


class CudaLedger(TorchDispatchMode):
    """Keeps the account of real CUDA tensors; what an operator takes for itself is read from torch's counter."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self._account = account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.cuda.reset_peak_memory_stats()
        result = func(*args, **(kwargs or {}))
        requested = torch.cuda.memory_stats_as_nested_dict()["requested_bytes"]["all"]
        inside = requested["peak"] - requested["current"]
        self._account.count(str(func), result, [inside] if inside > 0 else [])
        return result


def operators_at_peak(content: dict[str, Any]) -> dict[str, int]:
    """Run the recipe with the account kept: bytes alive at the last step's peak, by operator."""
    recipe = recipe_from_dict(content)
    micro_batches = min(MICRO_BATCHES, recipe.batch.gradient_accumulation_steps)
    for field, value in {"device": "virtual", "gradient_accumulation_steps": micro_batches}.items():
        recipe = replace_field(recipe, field, value)
    account = Account()
    ledger = CudaLedger(account)

    def begin(job: Any, _recorder: Any) -> None:
        account.hold_model(job.model)
        job.trainer.add_callback(_PhaseAtEachStep(account))
        ledger.__enter__()

    with tempfile.TemporaryDirectory() as folder:
        try:
            execute(inputs_of(recipe), output_dir=Path(folder), save=False, on_ready=begin)
        finally:
            ledger.__exit__(None, None, None)
    return dict(account.peak().by_operator())


class _PhaseAtEachStep(TrainerCallback):
    def __init__(self, account: Account) -> None:
        self._account = account

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._account.begin_phase()
