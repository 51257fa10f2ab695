"""Run a recipe in this process, on the device at hand, and report what came of it.

The same code runs on a real GPU, on a virtual one (this process was then started by `virtual_gpu`) and on a CPU.
"""

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from qlora_lowmem.data import CheckedData
from qlora_lowmem.environment import local_rank, processes
from qlora_lowmem.errors import DoesNotFitError, UsageError
from qlora_lowmem.lean import LeanReport, foresee_lean
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.attribution_recorder import AttributionRecorder
from qlora_lowmem.memory.device import device_name
from qlora_lowmem.memory.owners import Floor, floor_of
from qlora_lowmem.memory.profile import MemoryProfile, provenance_here
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.models.loading import choose_precision, load_config, load_tokenizer, skeleton
from qlora_lowmem.models.sources import ModelSource, source_of
from qlora_lowmem.models.targets import lean_options, lean_refusals, resolve_targets, why_not_packed
from qlora_lowmem.models.trusted import check_checkpoint
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.job import Job, PhaseCallback, apply_memory_limit, build_job, check_warm_up, set_allocator
from qlora_lowmem.run.out_of_memory import first_words, is_out_of_memory, whose_memory
from qlora_lowmem.run_folder.checkpoints import NotSavedError, newest_whole
from qlora_lowmem.tokens.dataset import TrainingData, count_tokens, training_data
from qlora_lowmem.tokens.store import TokenReport
from qlora_lowmem.training.adamw import check_gradient_release
from qlora_lowmem.training.interruption import Interruption
from qlora_lowmem.training.warm_up import WarmUp


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        profile: peaks by phase; None on a CPU.
        losses: the logged training losses in order (zeros on a virtual GPU, where values do not exist).
        loss_steps: the step at which each was logged; it is the mean of the steps since the one before.
        evaluations: (step, loss on the samples held out) in order.
        steps: optimizer steps done.
        tokens: tokens seen while training, padding left out.
        new_tokens: those of them that this process saw; the others came before it resumed.
        seconds: wall time of training in this process.
        trainable_parameters, adapted_modules: size of what is trained.
        floor: bytes that no method of training this recipe avoids.
        profiles: peaks of every process, one a card.
        attribution: the steady step's peak by kind, where it was asked for.
        data: what tokenising came to; None for synthetic samples.
        lean: which ideas of the section `lean` the model took, and which not; None where they were not asked for.
    """

    profile: MemoryProfile | None
    losses: tuple[float, ...]
    loss_steps: tuple[int, ...]
    evaluations: tuple[tuple[int, float], ...]
    steps: int
    tokens: int
    new_tokens: int
    seconds: float
    trainable_parameters: int
    adapted_modules: int
    floor: Floor
    profiles: tuple[MemoryProfile, ...] = ()
    attribution: Attribution | None = None
    data: TokenReport | None = None
    lean: LeanReport | None = None


class OutOfGpuMemoryError(DoesNotFitError):
    """The card's memory ran out: the phase in which it came, the peaks until then, the checkpoint that stands."""

    def __init__(self, phase: str, torch_message: str, profile: MemoryProfile, checkpoint: Path | None = None) -> None:
        super().__init__(f"out of GPU memory in phase {phase!r}: {torch_message}")
        self.phase = phase
        self.torch_message = torch_message
        self.profile = profile
        self.checkpoint = checkpoint


class OutOfHostMemoryError(DoesNotFitError):
    """The host's memory ran out, page-locked or not; no other card would help."""

    def __init__(self, recipe: Recipe, phase: str, message: str, checkpoint: Path | None = None) -> None:
        taken_by = {
            "lean.checkpoints (set it to segments)": recipe.lean.lean and recipe.lean.checkpoints == "host",
            "memory.activation_offloading (set it to false)": recipe.memory.activation_offloading,
            "dataloader.pin_memory (set it to false)": recipe.dataloader.pin_memory,
            "run.device: cpu (the whole job is there)": recipe.run.device == "cpu",
        }
        asks = [words for words, set_so in taken_by.items() if set_so]
        kept = f" {checkpoint} is whole: the same command goes on from there." if checkpoint else ""
        super().__init__(
            f"out of host memory in phase {phase!r}: {message}. This is the machine's own memory, not the card's"
            f"{'; it is asked for by ' + ', '.join(asks) if asks else ''}. Ask for less, or end other programs.{kept}"
        )
        self.phase = phase
        self.checkpoint = checkpoint


def check_model(recipe: Recipe) -> tuple[int, int]:
    """Resolve the recipe's target modules on the meta device, before any weights are read.

    Returns:
        (modules that get an adapter, trainable parameters).

    Raises:
        UsageError: a model or target modules that do not exist; packing that the model does not allow.
    """
    source = source_of(recipe)
    check_packing(recipe, source)
    model = skeleton(recipe, source)
    targets = resolve_targets(model, recipe.lora.target_modules)
    linears: list[Any] = [model.get_submodule(name) for name in targets.modules]
    # A is (r, in_features), B is (out_features, r).
    return len(linears), sum(recipe.lora.lora_r * (m.in_features + m.out_features) for m in linears)


def check_lean(recipe: Recipe) -> LeanReport | None:
    """What can be known of the section `lean` before any weights are read; None where lean is off.

    Raises:
        UsageError: the model or the device cannot take an option of it.
    """
    if not recipe.lean.lean:
        return None
    source = source_of(recipe)
    with lean_refusals(recipe):
        return foresee_lean(skeleton(recipe, source), lean_options(recipe), _device_type(recipe))


def check_samples(recipe: Recipe, samples: CheckedData) -> tuple[TokenReport, tuple[str, ...]]:
    """What tokenising the recipe's data will come to, and what a person should know of it; nothing is written.

    Raises:
        UsageError: a tokenizer that is not there, data that do not go with its chat template, a warm-up that is longer
            than the run over them.
    """
    source = source_of(recipe)
    tokens, notes = count_tokens(recipe, samples, load_tokenizer(recipe, source))
    if not recipe.batch.packing:  # how many packs there will be is known once they are made
        check_warm_up(recipe, tokens.samples)
    return tokens, notes


def check_packing(recipe: Recipe, source: ModelSource) -> None:
    """Refuse packing where a packed sample would see another.

    Raises:
        UsageError: the model's layers do not keep packed samples apart.
    """
    reason = why_not_packed(load_config(recipe, source)) if recipe.batch.packing else None
    if reason is not None:
        raise UsageError(f"batch.packing: true, and {recipe.base.model!r} cannot: {reason}. Set batch.packing to false")


def execute(
    recipe: Recipe,
    samples: CheckedData | None = None,
    *,
    output_dir: Path,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_ready: Any = None,
    save: bool = True,
    warm_up: bool = False,
    interruption: Interruption | None = None,
    attribution: AttributionRecorder | None = None,
) -> Outcome:
    """Train `recipe` to its end. `samples` is None for synthetic data.

    Args:
        on_ready: called with the `Job` and the recorder (None on a CPU) once everything is loaded.
        save: whether checkpoints and the adapter are written; where values do not exist (virtual GPU), only to see
            what that takes.
        warm_up: run the longest batch before the first step, so that what will not fit fails at once; not on a CPU.
        interruption: ends training after the current step when a signal comes.
        attribution: records where the bytes of the steady step's peak go; not on a CPU.

    Raises:
        OutOfGpuMemoryError: the card's memory ran out; the last good step is saved, if `save`.
        OutOfHostMemoryError: the host's did; as above.
        StoppedBySignal: a signal ended it early; its step is saved, if `save`.
        NotSavedError: a checkpoint or the adapter could not be written.
        UsageError: whatever of recipe, model or data turns out not to work.
    """
    source = source_of(recipe)
    on_cpu = _device_type(recipe) == "cpu"
    recorder = None if on_cpu else start_recorder(recipe)
    supports_bf16 = on_cpu or torch.cuda.get_device_capability(local_rank()) >= (8, 0)
    precision = choose_precision(recipe, _device_type(recipe), supports_bf16)
    check_gradient_release(recipe, loss_scaling=precision.loss_scaling)
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank())
    check_packing(recipe, source)
    if recipe.lean.scan == "triton" or recipe.lean.quantised_embeddings != "none":
        check_lean(recipe)  # what can be refused, before any weights are read
    if resume_from is not None:
        check_checkpoint(resume_from)
    tokenizer = load_tokenizer(recipe, source)
    data: TrainingData | None = None
    if samples is not None:
        data = training_data(recipe, samples, tokenizer, output_dir if save else None)
        check_warm_up(recipe, len(data.dataset))
    phase = "load"
    job: Job | None = None
    try:
        if recorder is not None:
            apply_memory_limit(recipe, recorder)
            if attribution is not None:
                attribution.start()
            recorder.begin("load")
        steps = [PhaseCallback(recorder)] if recorder is not None else []
        callbacks = [*callbacks, interruption] if interruption is not None else list(callbacks)
        job = build_job(
            recipe, source, precision, data, tokenizer, device, [*steps, *callbacks], output_dir, save, recorder
        )
        if recorder is not None:
            recorder.end()
            if attribution is not None:
                attribution.watch(job.trainer)
        if warm_up and recorder is not None:
            job.trainer.add_callback(WarmUp(job.trainer, recorder))
        if on_ready is not None:
            on_ready(job, recorder)
        phase = "training"
        started = time.perf_counter()
        job.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = time.perf_counter() - started
        if interruption is not None:
            state = job.trainer.state
            interruption.check(state.global_step, state.max_steps, output_dir if save else None)
        if save:
            job.trainer.save_model(str(output_dir))
    except (RuntimeError, MemoryError) as error:
        whose = whose_memory(error)
        if whose is None or (whose == "card" and recorder is None):
            raise
        running = (recorder.running_phase if recorder is not None else None) or phase
        profile = recorder.profile() if recorder is not None else None
        saved = _rescue(job, error) if save else None
        if whose == "host" or profile is None:
            raise OutOfHostMemoryError(recipe, running, first_words(error), saved) from error
        raise OutOfGpuMemoryError(running, first_words(error), profile, saved) from error
    finally:
        if data is not None and not save:
            data.discard()  # here, for a process on a virtual GPU may end without Python's own cleaning up
    outcome = _outcome(job, recorder, seconds, attribution)
    if save and job.trainer.is_world_process_zero():
        job.data.discard()
    return outcome


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
    set_allocator(recipe)
    try:
        recorder = Recorder(device_name(local_rank()), provenance_here(), local_rank())
        torch.cuda.set_device(local_rank())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            f"out of GPU memory before anything was loaded: the card has no room for a CUDA context "
            f"({first_words(error)}). Other programs hold it (nvidia-smi lists them): end them, or choose another card "
            "with CUDA_VISIBLE_DEVICES"
        ) from error
    return recorder


def _device_type(recipe: Recipe) -> str:
    """`cpu`, or `cuda` for a real card and a virtual one."""
    return "cpu" if recipe.run.device == "cpu" else "cuda"


def _outcome(job: Job, recorder: Recorder | None, seconds: float, attribution: AttributionRecorder | None) -> Outcome:
    history = job.trainer.state.log_history
    batch, hidden = job.recipe.batch, int(job.model.config.get_text_config().hidden_size)
    profile = recorder.profile() if recorder is not None else None
    tokens = int(next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), 0))
    return Outcome(
        profile=profile,
        losses=tuple(float(entry["loss"]) for entry in history if "loss" in entry),
        loss_steps=tuple(int(entry["step"]) for entry in history if "loss" in entry),
        evaluations=tuple((int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry),
        steps=int(job.trainer.state.global_step),
        tokens=tokens,
        new_tokens=tokens - job.trainer.tokens_before,
        seconds=seconds,
        trainable_parameters=sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        adapted_modules=len(job.targets.modules),
        floor=floor_of(job.model, job.trainer.optimizer, batch.batch_size * batch.max_seq_length * hidden),
        profiles=_profiles(profile),
        attribution=attribution.finish(profile) if attribution is not None and profile is not None else None,
        data=job.data.report,
        lean=job.lean,
    )


def _profiles(profile: MemoryProfile | None) -> tuple[MemoryProfile, ...]:
    """Those of all processes, in the order of their ranks."""
    if profile is None or processes() == 1:
        return () if profile is None else (profile,)
    return tuple(gather_object([profile]))


def _rescue(job: Job | None, error: BaseException) -> Path | None:
    """The checkpoint that stands after running out of memory, made now where a good step is not saved yet."""
    if job is None:
        return None
    traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors
    saved = None
    try:
        saved = job.trainer.rescue()
    except (RuntimeError, MemoryError, NotSavedError) as again:  # that there is too little memory is what to tell
        if not isinstance(again, NotSavedError) and not is_out_of_memory(again):
            raise
    return saved or newest_whole(Path(str(job.trainer.args.output_dir))).checkpoint
