"""What a fork of the server does: run a recipe, or count what a step of it multiplies, recomputation included.

FLOPs are counted by PyTorch's own formulas (`torch.utils.flop_counter`: two FLOPs a multiplication, by the operands'
shapes), and one for bitsandbytes' product with a 4-bit weight. A mode of our own counts: `FlopCounterMode` also tracks
modules, which keeps activations alive that checkpointing lets go. What runs inside a Triton kernel has no formula and
is not counted. FLOPs are work, not time: no kernel's speed is in them.
"""

import math
import tempfile
import traceback
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # registers its operators
import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qlora_lowmem.memory.attribution_recorder import AttributionRecorder
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe.io import recipe_from_dict, replace_field
from qlora_lowmem.run.execute import OutOfGpuMemoryError, execute


def run_here(content: dict[str, Any], attribute: bool = False, snapshot: str | None = None) -> Any:
    """Run a recipe for its steps, and return its `RecipeRun` as plain data.

    Args:
        content: the recipe as plain data.
        attribute, snapshot: as in `submit_recipe`.
    """
    return msgspec.to_builtins(_run(content, attribute, snapshot))


def _run(content: dict[str, Any], attribute: bool, snapshot: str | None) -> RecipeRun:
    recipe = replace_field(recipe_from_dict(content), "device", "virtual")
    recorder = AttributionRecorder(uniform=True) if attribute else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = execute(recipe, output_dir=Path(folder), save=False, attribution=recorder)
    except OutOfGpuMemoryError as error:
        return RecipeRun(error.profile, out_of_memory=error.torch_message, phase=error.phase)
    except Exception:  # what a person reads is made of this in the parent
        return RecipeRun(None, failure=traceback.format_exc())
    if recorder is not None and snapshot is not None and outcome.attribution is not None:
        recorder.save_snapshot(Path(snapshot))
    return RecipeRun(
        outcome.profile,
        trainable_parameters=outcome.trainable_parameters,
        floor_bytes=outcome.floor.total,
        attribution=outcome.attribution,
    )


class FlopCount(TorchDispatchMode):
    """Sums the FLOPs of every operator with a formula that runs inside, backward included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator is torch.ops.bitsandbytes.gemm_4bit:
            self.total += product_with_4bit(*args[:3])
        elif operator in flop_registry:
            self.total += int(flop_registry[operator](*args, **kwargs, out_val=out))
        return out


def product_with_4bit(inputs: torch.Tensor, _packed: torch.Tensor, shape: list[int]) -> int:
    """FLOPs of `inputs` (..., in_features) by a packed weight whose `shape` is (out_features, in_features)."""
    return 2 * math.prod(inputs.shape) * shape[0]


def count_here(content: dict[str, Any]) -> int:
    """FLOPs of the last micro-batch of a recipe's first step, forward, recomputation and backward."""
    recipe = replace_field(recipe_from_dict(content), "device", "virtual")
    counted = FlopCount()

    def watch(job: Any, _recorder: Any) -> None:
        plain = job.trainer.training_step

        def count(*args: Any, **kwargs: Any) -> Any:
            counted.total = 0
            with counted:
                return plain(*args, **kwargs)

        job.trainer.training_step = count

    with tempfile.TemporaryDirectory() as folder:
        execute(recipe, output_dir=Path(folder), save=False, on_ready=watch)
    return counted.total
