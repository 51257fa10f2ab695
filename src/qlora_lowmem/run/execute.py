"""Run a recipe in this process, on the device at hand, and report what came of it.

The same code runs on a real GPU, on a virtual one (this process was then started by `virtual_gpu`) and on a CPU.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerCallback

from qlora_lowmem.environment import processes
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.lean import LeanReport
from qlora_lowmem.memory.owners import Floor, floor_of
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.models.adapters import Adapted
from qlora_lowmem.run.job import Job, PhaseCallback, apply_memory_limit, build_job, device_of, start_recorder
from qlora_lowmem.run.out_of_memory import raise_if_out_of_memory
from qlora_lowmem.run.own_failure import own_failure
from qlora_lowmem.run.preflight import Inputs, preflight, tokenised
from qlora_lowmem.tokens.store import TokenReport
from qlora_lowmem.training.ending import Interruption

if TYPE_CHECKING:
    from qlora_lowmem.memory.attribution import Attribution
    from qlora_lowmem.memory.attribution_recorder import AttributionRecorder


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        profile: peaks by phase; None on a CPU.
        losses: the logged training losses in order (zeros on a virtual GPU, where values do not exist).
        loss_steps: the step at which each was logged; it is the mean of the steps since the one before.
        evaluations: (step, loss on the samples held out) in order.
        steps: optimizer steps done.
        tokens: seen while training, padding left out; `new_tokens` by this process, the others before it resumed.
        seconds: wall time of training in this process.
        floor: bytes that no method of training this recipe avoids.
        profiles: peaks of every process, one a card, in the order of their ranks.
        attribution: the steady step's peak by kind, where it was asked for.
        trained_of_the_base: as in `Adapted`.
        data: what tokenising came to; None for synthetic samples.
        evaluation_data: the same of `eval_data`.
        lean: what of the section `lean` the model took, and what not; None where it was not asked for.
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
    attribution: "Attribution | None" = None
    trained_of_the_base: tuple[str, ...] = ()
    data: TokenReport | None = None
    evaluation_data: TokenReport | None = None
    lean: LeanReport | None = None


def execute(
    inputs: Inputs,
    *,
    output_dir: Path,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_ready: Callable[[Job, Recorder | None], None] | None = None,
    save: bool = True,
    warm_up: bool = False,
    interruption: Interruption | None = None,
    attribution: "AttributionRecorder | None" = None,
) -> Outcome:
    """Train a recipe to its end.

    Args:
        on_ready: called with the job and the recorder (None on a CPU) once everything is loaded.
        save: whether checkpoints and the adapter are written; on a virtual GPU only to see what that takes.
        warm_up: run the longest batch before the first step, so that what will not fit fails at once; not on a CPU.
        interruption: ends training after the current step when a signal comes.
        attribution: records where the bytes of the steady step's peak go; not on a CPU.

    Raises:
        OutOfGpuMemoryError, OutOfHostMemoryError: memory ran out; the last good step is saved, if `save`.
        StoppedBySignal: a signal ended it early; its step is saved, if `save`.
        NotSavedError: a checkpoint or the adapter could not be written.
        UsageError: whatever of recipe, model or data turns out not to work, a model that alone does not run among it.
    """
    recipe = inputs.recipe
    recorder = start_recorder(recipe) if inputs.device_type == "cuda" else None
    checked = preflight(inputs, supports_bf16=device_of(recipe)[1], resume_from=resume_from)
    data = tokenised(checked, output_dir if save else None)
    phase, job = "load", None
    try:
        if recorder is not None:
            apply_memory_limit(recipe, recorder)
            if attribution is not None:
                attribution.start()
            recorder.begin("load")
            callbacks = [PhaseCallback(recorder), *callbacks]
        callbacks = [*callbacks, interruption] if interruption is not None else callbacks
        job = build_job(checked, data, callbacks, output_dir, save=save, recorder=recorder, warm_up=warm_up)
        if recorder is not None:
            recorder.end()
            if attribution is not None:
                attribution.watch(job.trainer)
        if on_ready is not None:
            on_ready(job, recorder)
        phase, started = "training", time.perf_counter()
        job.trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        seconds = time.perf_counter() - started
        if interruption is not None:
            interruption.check(job.trainer.state, output_dir if save else None)
        if save:
            job.trainer.save_model(str(output_dir))
    except QloraLowmemError:
        raise
    except Exception as error:
        raise_if_out_of_memory(error, recipe, phase, recorder, job.trainer if job is not None and save else None)
        told = own_failure(recipe, inputs.source, error) if job is not None else None
        if told is not None:
            raise told from error
        raise
    finally:
        if not save:
            data.discard()  # here, for a process on a virtual GPU may end without Python's own cleaning up
    outcome = _outcome(job, recorder, seconds, attribution)
    if save and job.trainer.is_world_process_zero():
        job.data.discard()
    return outcome


def _outcome(job: Job, recorder: Recorder | None, seconds: float, attribution: "AttributionRecorder | None") -> Outcome:
    history = job.trainer.state.log_history
    batch, hidden = job.checked.inputs.recipe.batch, int(job.model.config.get_text_config().hidden_size)
    profile = recorder.profile() if recorder is not None else None
    profiles = [] if profile is None else gather_object([profile]) if processes() > 1 else [profile]
    tokens = int(next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), 0))
    adapted = Adapted.of(job.model)
    return Outcome(
        profile=profile,
        losses=tuple(float(entry["loss"]) for entry in history if "loss" in entry),
        loss_steps=tuple(int(entry["step"]) for entry in history if "loss" in entry),
        evaluations=tuple((int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry),
        steps=int(job.trainer.state.global_step),
        tokens=tokens,
        new_tokens=tokens - job.trainer.tokens_before,
        seconds=seconds,
        trainable_parameters=adapted.parameters,
        adapted_modules=len(adapted.modules),
        floor=floor_of(job.model, job.trainer.optimizer, batch.batch_size * batch.max_seq_length * hidden),
        profiles=tuple(profiles),
        attribution=attribution.finish(profile) if attribution is not None and profile is not None else None,
        trained_of_the_base=adapted.base,
        data=job.data.report,
        evaluation_data=job.data.evaluation.report if job.data.evaluation is not None else None,
        lean=job.lean,
    )
