"""Run a recipe in this process, on the device at hand, and report what came of it.

The same code runs on a real GPU, on a virtual one (this process was then started by `virtual_gpu`) and on a CPU.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_lowmem import virtual_gpu
from qlora_lowmem.data import Samples
from qlora_lowmem.dataset import TrainingData, training_data
from qlora_lowmem.errors import DoesNotFitError, UsageError
from qlora_lowmem.job import Job, PhaseCallback, apply_memory_limit, build_job, set_allocator
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.attribution_recorder import AttributionRecorder
from qlora_lowmem.memory.floor import Floor, floor_of
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.models.loading import load_tokenizer, skeleton
from qlora_lowmem.models.precision import choose_precision
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.models.targets import resolve_targets
from qlora_lowmem.recipe import Recipe


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        profile: peaks by phase; None on a CPU.
        losses: the logged training losses in order (zeros on a virtual GPU, where values do not exist).
        steps: optimizer steps done.
        tokens: tokens seen while training, padding left out.
        seconds: wall time of training.
        trainable_parameters, adapted_modules: size of what is trained.
        floor: bytes that no method of training this recipe avoids.
        attribution: the steady step's peak by kind, where it was asked for.
    """

    profile: MemoryProfile | None
    losses: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    adapted_modules: int
    floor: Floor
    attribution: Attribution | None = None


class OutOfGpuMemoryError(DoesNotFitError):
    """torch's own out-of-memory error, with the phase in which it came and the peaks until then."""

    def __init__(self, phase: str, torch_message: str, profile: MemoryProfile) -> None:
        super().__init__(f"out of GPU memory in phase {phase!r}: {torch_message}")
        self.phase = phase
        self.torch_message = torch_message
        self.profile = profile


def device_name() -> str:
    """The card's name: of the table for a virtual GPU, else CUDA's own in lower case with dashes."""
    card = virtual_gpu.current_card()
    if card is not None:
        return card.name
    return torch.cuda.get_device_name(0).lower().replace(" ", "-")


def check_model(recipe: Recipe) -> tuple[int, int]:
    """Resolve the recipe's target modules on the meta device, before any weights are read.

    Returns:
        (modules that get an adapter, trainable parameters).

    Raises:
        UsageError: a model or target modules that do not exist.
    """
    model = skeleton(recipe, resolve_model(recipe.base.model, recipe.base.weights))
    targets = resolve_targets(model, recipe.lora.target_modules)
    linears: list[Any] = [model.get_submodule(name) for name in targets.modules]
    # A is (r, in_features), B is (out_features, r).
    return len(linears), sum(recipe.lora.lora_r * (m.in_features + m.out_features) for m in linears)


def execute(
    recipe: Recipe,
    samples: Samples | None = None,
    *,
    output_dir: Path,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_ready: Any = None,
    save: bool = True,
    attribution: AttributionRecorder | None = None,
) -> Outcome:
    """Train `recipe` to its end. `samples` is None for synthetic data.

    Args:
        on_ready: called with the `Job` and the recorder (None on a CPU) once everything is loaded.
        save: whether checkpoints and the adapter are written; never where values do not exist (virtual GPU).
        attribution: records where the bytes of the steady step's peak go; not on a CPU.

    Raises:
        OutOfGpuMemoryError: torch ran out of memory.
        UsageError: whatever of recipe, model or data turns out not to work.
    """
    source = resolve_model(recipe.base.model, recipe.base.weights)
    on_cpu = recipe.run.device == "cpu"
    recorder = None if on_cpu else _recorder(recipe)
    supports_bf16 = on_cpu or torch.cuda.get_device_capability(0) >= (8, 0)
    precision = choose_precision(recipe, "cpu" if on_cpu else "cuda", supports_bf16)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    tokenizer = load_tokenizer(recipe, source)
    data: TrainingData | None = None
    if samples is not None:
        data = training_data(recipe, samples, tokenizer)
    phase = "load"
    try:
        if recorder is not None:
            apply_memory_limit(recipe, recorder)
            if attribution is not None:
                attribution.start()
            recorder.begin("load")
        steps = [PhaseCallback(recorder)] if recorder is not None else []
        job = build_job(recipe, source, precision, data, tokenizer, device, [*steps, *callbacks], output_dir, save)
        if recorder is not None:
            recorder.end()
            if attribution is not None:
                attribution.watch(job.trainer)
        if on_ready is not None:
            on_ready(job, recorder)
        phase = "training"
        started = time.perf_counter()
        job.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = time.perf_counter() - started
    except torch.OutOfMemoryError as error:
        assert recorder is not None
        running = recorder.running_phase or phase
        raise OutOfGpuMemoryError(running, _first_sentences(error), recorder.profile()) from error
    if save:
        job.trainer.save_model(str(output_dir))
    return _outcome(job, recorder, seconds, attribution)


def _recorder(recipe: Recipe) -> Recorder:
    if not torch.cuda.is_available():
        raise UsageError(
            "run.device: 'cuda' needs a GPU, and torch sees none (no NVIDIA driver, no device, or a CPU build of "
            "torch). Use --device virtual to learn what the job needs, or --device cpu for a small model"
        )
    set_allocator(recipe)
    card = virtual_gpu.current_card()
    return Recorder(device_name(), "measured" if card is None else "virtual")


def _outcome(job: Job, recorder: Recorder | None, seconds: float, attribution: AttributionRecorder | None) -> Outcome:
    history = job.trainer.state.log_history
    batch, hidden = job.recipe.batch, int(job.model.config.get_text_config().hidden_size)
    profile = recorder.profile() if recorder is not None else None
    return Outcome(
        profile=profile,
        losses=tuple(float(entry["loss"]) for entry in history if "loss" in entry),
        steps=int(job.trainer.state.global_step),
        tokens=int(next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), 0)),
        seconds=seconds,
        trainable_parameters=sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        adapted_modules=len(job.targets.modules),
        floor=floor_of(job.model, job.trainer.optimizer, batch.batch_size * batch.max_seq_length * hidden),
        attribution=attribution.finish(profile) if attribution is not None and profile is not None else None,
    )


def _first_sentences(error: BaseException) -> str:
    """torch's message up to its advice on the allocator, on one line."""
    text = " ".join(str(error).split())
    return text.split(" If reserved but unallocated")[0]
