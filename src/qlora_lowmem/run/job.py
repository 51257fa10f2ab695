"""A recipe made real: the 4-bit base, its adapters, the data, the optimizer and TRL's trainer, on one device."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import local_rank
from qlora_lowmem.errors import DoesNotFitError, UsageError
from qlora_lowmem.lean import LeanReport, apply_lean
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.models.adapters import adapt, of_the_base
from qlora_lowmem.models.loading import Precision, assert_on_device, load_base
from qlora_lowmem.models.mixtures import name_experts, router_loss_coefficient
from qlora_lowmem.models.targets import lean_options, lean_refusals
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.out_of_memory import first_words, whose_memory
from qlora_lowmem.run.preflight import Preflight
from qlora_lowmem.tokens.dataset import TrainingData
from qlora_lowmem.training.adamw import adamw_of
from qlora_lowmem.training.trainer import LowMemTrainer
from qlora_lowmem.training.warm_up import WarmUp

_NEVER = 2**31 - 1  # steps: transformers evaluates at the end in any case


class PhaseCallback(TrainerCallback):
    """Tell the recorder which step it is: the first creates the optimizer's state and the libraries' workspaces."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._phase = "first step"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.begin(self._phase)
        self._phase = "steady"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recorder.end()


@dataclass
class Job:
    """Everything that a training run consists of, on its device and ready to train."""

    checked: Preflight
    model: PeftModel
    trainer: LowMemTrainer
    lean: LeanReport | None
    data: TrainingData


def start_recorder(recipe: Recipe) -> Recorder:
    """A recorder on the GPU that torch sees, the allocator set as the recipe says.

    Raises:
        UsageError: torch sees none.
        DoesNotFitError: there is no room on the card for this process's CUDA context.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "run.device: 'cuda' needs a GPU, and torch sees none (no NVIDIA driver, no device, or a CPU build of "
            "torch). Use --device virtual to learn what the job needs, or --device cpu for a small model"
        )
    # Whatever the environment says: reserved peaks depend on it.
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{recipe.memory.expandable_segments}")
    try:
        recorder = Recorder(local_rank())
        torch.cuda.set_device(local_rank())
    except RuntimeError as error:
        if not whose_memory(error):
            raise
        raise DoesNotFitError(
            f"out of GPU memory before anything was loaded: the card has no room for a CUDA context "
            f"({first_words(error)}). Other programs hold it (nvidia-smi lists them): end them, or choose another card "
            "with CUDA_VISIBLE_DEVICES"
        ) from error
    return recorder


def device_of(recipe: Recipe) -> tuple[torch.device, bool]:
    """The device of this process, and whether it computes in bf16 (a GPU from compute capability 8.0 on, Ampere)."""
    if recipe.run.device == "cpu":
        return torch.device("cpu"), True
    return torch.device("cuda", local_rank()), torch.cuda.get_device_capability(local_rank()) >= (8, 0)


def apply_memory_limit(recipe: Recipe, recorder: Recorder) -> None:
    """Make the recipe's `max_memory` a real cap of the caching allocator.

    The cap counts what the allocator takes: the limit less what already lies outside it (the CUDA context), and never
    more than is free now. So the job fails with an out-of-memory error where a driver would begin to spill into
    system memory (NVIDIA's Windows driver since 536.40).
    """
    index = recorder.index
    total = torch.cuda.get_device_properties(index).total_memory
    limit = recipe.memory.memory_limit_bytes(total)
    cap = min(limit - recorder.outside_allocator_bytes, recorder.room_bytes() + torch.cuda.memory_reserved(index))
    torch.cuda.set_per_process_memory_fraction(max(cap, 0) / total, index)


def build_job(
    checked: Preflight,
    data: TrainingData,
    callbacks: Sequence[TrainerCallback],
    output_dir: Path,
    *,
    save: bool,
    recorder: Recorder | None = None,
    warm_up: bool = False,
) -> Job:
    """Load the base model, add adapters and make the trainer.

    Args:
        save: whether checkpoints are written.
        recorder: records the phases after loading; None on a CPU.
        warm_up: as `execute` takes it.

    Raises:
        UsageError: weights that cannot be found; an option of the section `lean` that the model cannot take.
        torch.cuda.OutOfMemoryError: it does not fit.
    """
    recipe, precision = checked.inputs.recipe, checked.precision
    assert precision is not None
    device, _ = device_of(recipe)
    arguments = training_arguments(checked, precision, output_dir, save=save, evaluate=data.evaluated_on is not None)
    transformers.set_seed(recipe.schedule.seed)
    model = load_base(recipe, checked.inputs.source, precision.compute, device, checked.skeleton)
    name_experts(model)
    adapted: Any = adapt(model, checked.lora_config, checked.trained_base.weights)
    beside = of_the_base(adapted).values()
    for parameter in beside:
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns of choices that the recipe states on purpose
        trainer = LowMemTrainer(
            model=adapted,
            args=arguments,
            train_dataset=data.dataset,
            eval_dataset=data.evaluated_on,
            processing_class=checked.tokenizer,
            callbacks=list(callbacks),
            optimizer_cls_and_kwargs=adamw_of(recipe),
            full_logits=recipe.memory.loss == "full",
            recorder=recorder,
        )
    if recorder is not None and warm_up:
        trainer.add_callback(WarmUp(trainer))
    # TRL casts what is trained of a quantised model to bf16; the recipe decides, and of the base nothing is rounded.
    for parameter in beside:
        parameter.requires_grad_(True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(precision.adapter)
    embedding = adapted.get_input_embeddings()
    whole = isinstance(embedding, torch.nn.Embedding) and embedding.weight.requires_grad  # PEFT's wrapper makes a copy
    if whole and precision.adapter is not precision.compute:
        # So that all that comes after it is as wide as ever.
        embedding.register_forward_hook(lambda _module, _given, embedded: embedded.to(precision.compute))
    with lean_refusals(recipe):
        lean = apply_lean(adapted, lean_options(recipe)) if recipe.lean.lean else None
    trainer.remove_callback(PrinterCallback)
    assert_on_device(adapted, device)
    return Job(checked, adapted, trainer, lean, data)


def training_arguments(
    checked: Preflight, precision: Precision, output_dir: Path, *, save: bool, evaluate: bool
) -> SFTConfig:
    """The recipe in TRL's words. Every argument that bears on memory is named, since TRL's defaults hide some."""
    recipe, on_cpu = checked.inputs.recipe, checked.inputs.device_type == "cpu"
    # Lean layers keep their own checkpoints; transformers' would wrap another around each.
    checkpointing = recipe.memory.gradient_checkpointing and not recipe.lean.lean
    return SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=recipe.batch.batch_size,
        gradient_accumulation_steps=recipe.batch.gradient_accumulation_steps,
        max_length=recipe.batch.max_seq_length,
        packing=recipe.batch.packing,
        dataset_kwargs={"skip_prepare_dataset": True},  # `dataset.py` made tokens, labels and packs of them
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        activation_offloading=recipe.memory.activation_offloading,
        optim=recipe.optimizer.optimizer,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        lr_scheduler_type=recipe.optimizer.lr_scheduler,
        warmup_steps=recipe.optimizer.warmup_steps or recipe.optimizer.warmup_ratio,  # a share where it is below 1
        neftune_noise_alpha=recipe.data.neftune_noise_alpha or None,
        max_steps=recipe.schedule.max_steps or -1,
        num_train_epochs=recipe.schedule.num_epochs,
        seed=recipe.schedule.seed,
        logging_steps=recipe.schedule.logging_steps,
        logging_nan_inf_filter=False,  # it would log 0 for a loss that is not finite; the trainer stops instead
        save_strategy="steps" if save else "no",
        save_steps=recipe.schedule.save_steps,
        save_total_limit=recipe.schedule.save_total_limit,
        # One batch of a step's size at a time, its loss alone: TRL's fused head then builds no logits.
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.schedule.eval_steps or _NEVER,
        per_device_eval_batch_size=recipe.batch.batch_size,
        prediction_loss_only=True,
        dataloader_num_workers=recipe.dataloader.dataloader_workers,
        dataloader_pin_memory=recipe.dataloader.pin_memory and not on_cpu,
        bf16=precision.compute is torch.bfloat16,
        fp16=precision.compute is torch.float16,
        tf32=None,
        use_cpu=on_cpu,
        report_to="none" if virtual_gpu.current_card() else recipe.run.report_to,  # a virtual GPU has no values
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every adapter is used in every step
        router_aux_loss_coef=router_loss_coefficient(checked.skeleton),
    )
