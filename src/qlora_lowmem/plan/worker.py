"""What a fork of the server does: run a recipe, or count what a step of it multiplies, recomputation included.

FLOPs are counted by PyTorch's own formulas (`torch.utils.flop_counter`: two FLOPs a multiplication, by the operands'
shapes), and one for bitsandbytes' product with a 4-bit weight. A mode of our own counts: `FlopCounterMode` also tracks
modules, which keeps activations alive that checkpointing lets go. What runs inside a Triton kernel has no formula and
is not counted. FLOPs are work, not time: no kernel's speed is in them.
"""

import math
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # registers its operators
import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import TrainerCallback

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import write_whole
from qlora_lowmem.memory.attribution_recorder import AttributionRecorder
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.models.random_weights import write_zero_checkpoint
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import recipe_from_dict, replace_field, replace_fields
from qlora_lowmem.run.brevity import Brevity, OverError
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.job import Job
from qlora_lowmem.run.merge import merge_run
from qlora_lowmem.run.out_of_memory import OutOfGpuMemoryError
from qlora_lowmem.run.preflight import inputs_of


def run_here(
    content: dict[str, Any],
    attribute: bool = False,
    snapshot: str | None = None,
    brief: bool = False,
    most: int | None = None,
    count: bool = False,
) -> Any:
    """Run a recipe for its steps, and return its `RecipeRun` as plain data.

    Args:
        content: the recipe as plain data.
        attribute, snapshot, brief, most, count: as in `submit_recipe`.
    """
    flops = FlopCount()

    def ready(job: Job, recorder: Recorder) -> None:
        if count:
            job.trainer.add_callback(_CountAtEnd(job.trainer, flops))
        if brief:
            Brevity(job, recorder, most)

    run = _run(content, attribute, snapshot, ready)
    return msgspec.to_builtins(replace(run, flops=flops.total))


def _run(content: dict[str, Any], attribute: bool, snapshot: str | None, on_ready: Any) -> RecipeRun:
    recipe = replace_field(recipe_from_dict(content), "device", "virtual")
    recorder = AttributionRecorder() if attribute else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = execute(
                inputs_of(recipe), output_dir=Path(folder), save=False, attribution=recorder, on_ready=on_ready
            )
    except OutOfGpuMemoryError as error:
        return RecipeRun(error.profile, out_of_memory=error.torch_message, phase=error.phase)
    except OverError as over:
        return RecipeRun(over.profile, stopped=True)
    except UsageError as error:
        return RecipeRun(None, failure=str(error), bad_input=True)
    except Exception:  # what a person reads is made of this in the parent
        return RecipeRun(None, failure=traceback.format_exc())
    if recorder is not None and snapshot is not None and outcome.attribution is not None:
        write_whole(Path(snapshot), recorder.snapshot())
    return RecipeRun(
        outcome.profile,
        trainable_parameters=outcome.trainable_parameters,
        floor_bytes=outcome.floor.total,
        refused=torch.cuda.memory_stats()["num_alloc_retries"] > 0,
        attribution=outcome.attribution,
    )


def live_here(content: dict[str, Any], folder: str, part: str) -> Any:
    """One part of a recipe's life, with what the parts before it left in `folder`: a `RecipeRun` as plain data."""
    run = Path(folder) / "run"
    recipe = _lived(recipe_from_dict(content), Path(folder) / "model")
    try:
        if part == "merge":
            found = RecipeRun(merge_run(recipe, run, Path(folder) / "merged", "bf16", "cuda"))
        else:
            resume_from = run / "checkpoint-1" if part == "resume" else None
            outcome = execute(inputs_of(recipe), output_dir=run, resume_from=resume_from, warm_up=part == "train")
            found = RecipeRun(outcome.profile, floor_bytes=outcome.floor.total)
    except OutOfGpuMemoryError as error:
        found = RecipeRun(error.profile, out_of_memory=error.torch_message, phase=error.phase)
    return msgspec.to_builtins(found)


def _lived(recipe: Recipe, model: Path) -> Recipe:
    """`recipe` from a full-size checkpoint in the folder `model`, over two steps with all that comes between."""
    if not model.is_dir():
        architecture = source_of(recipe, weights="random").architecture
        assert architecture is not None
        write_zero_checkpoint(architecture, model)
    changes: dict[str, Any] = {"weights": "pretrained", "model": str(model), "revision": None, "data": "synthetic"}
    changes |= {"max_steps": 2, "warmup_steps": 0, "eval_fraction": 0.2, "eval_data": None, "eval_steps": 1}
    changes |= {"save_steps": 1, "save_total_limit": 2, "device": "virtual"}
    return replace_fields(recipe, changes)


# Nine of ten operators of a step: none has a formula, or is made of others that have one.
_UNCOUNTED = (
    "add.Tensor", "add_.Tensor", "addcmul", "addcmul_", "as_strided", "clone", "copy_", "detach", "empty.memory_format",
    "empty_like", "empty_strided", "exp", "exp_", "expand", "mean.dim", "mul.Tensor", "mul_.Tensor", "permute",
    "pow.Tensor_Scalar", "rsqrt_", "select.int", "silu", "slice.Tensor", "sub.Tensor", "sub_.Tensor", "sum.dim_IntList",
    "t", "_to_copy", "transpose.int", "unbind.int", "_unsafe_view", "unsqueeze", "view",
)  # fmt: skip


class FlopCount(TorchDispatchMode):
    """Sums the FLOPs of every operator with a formula that runs inside, backward included.

    While it counts, the commonest of the others do not come through Python, which took as long as the step itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __enter__(self) -> Any:
        """Begin to count."""
        self._past = torch.library.Library("aten", "IMPL", "Python")
        for name in _UNCOUNTED:
            self._past.impl(name, torch.library.fallthrough_kernel)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> Any:
        """Count no more."""
        self._past._destroy()
        return super().__exit__(*exception)  # type: ignore[no-untyped-call]

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


class _CountAtEnd(TrainerCallback):
    """Counts a micro-batch after the last step, when every phase and its peaks have ended."""

    def __init__(self, trainer: Any, flops: FlopCount) -> None:
        self._trainer = trainer
        self._step = trainer.training_step
        self._flops = flops

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Called after the last step."""
        batch = next(iter(self._trainer.get_train_dataloader()))
        with self._flops:
            self._step(self._trainer.model_wrapped, batch)


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
        execute(inputs_of(recipe), output_dir=Path(folder), save=False, on_ready=watch)
    return counted.total
