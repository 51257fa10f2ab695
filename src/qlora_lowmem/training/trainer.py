"""TRL's trainer with the recipe's choice of loss, whole checkpoints, exact resuming and a peak for each phase."""

import contextlib
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from qlora_lowmem import virtual_gpu
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.run_folder.checkpoints import CheckpointStore, newest_complete, step_of
from qlora_lowmem.training.adamw import AdamW
from qlora_lowmem.training.ending import DivergenceCheck, StopEvaluation
from qlora_lowmem.training.state import LISTED_SAMPLES, ComputedOrder, RandomState, RunningTotals, undisturbed


class _Own(TrainerCallback):
    """What the trainer itself does between the events of others: it comes after the callbacks that it is given.

    As training begins it takes up what a checkpoint left. The last step is logged too, where `logging_steps` does not
    divide the number of steps. `stepping`: the optimizer is in its step; what fails there leaves some weights stepped.
    """

    def __init__(self, take_up: Callable[[], None]) -> None:
        self._take_up = take_up
        self.stepping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._take_up()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class LowMemTrainer(SFTTrainer):
    """What a run needs to be left alone overnight, on top of TRL's trainer.

    Checkpoints are whole or not there (`checkpoints.py`), a run that goes on logs what an undisturbed one logs,
    evaluation neither builds logits nor disturbs the random generators, and every phase is recorded. The private
    methods that it overrides, and who calls them, are listed and held in `tests/training/test_upstream.py`.

    Args:
        full_logits: train from the full logits, as transformers' `Trainer` does, instead of TRL's fused LM head.
        recorder: where the phases `save`, `evaluate`, `resume` and `warm-up` are recorded; None on a CPU.
    """

    def __init__(self, *args: Any, full_logits: bool, recorder: Recorder | None, **kwargs: Any) -> None:
        self.tokens_before = 0  # trained on before this process resumed
        self._full_logits = full_logits
        self._recorder = recorder
        self._staging: Path | None = None
        self._resumed_from: Path | None = None
        self._good: tuple[int, RandomState, RunningTotals] | None = None
        self._own = _Own(self._take_up)
        super().__init__(*args, **kwargs)
        self.add_callback(self._own)
        self._output_dir = Path(str(self.args.output_dir))
        _, options = self.optimizer_cls_and_kwargs or (None, {})
        self._releases = bool(options.get("gradient_release"))
        self._divergence = DivergenceCheck(self._output_dir, self.args.max_grad_norm, gradient_release=self._releases)
        self._has_values = virtual_gpu.current_card() is None
        self._store = CheckpointStore(self._output_dir, self.args.save_total_limit or 1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With full logits, the loss of transformers' `Trainer`: (batch, seq, vocabulary) logits, upcast to fp32.

        A mixture's model adds its routers' auxiliary loss whole to every micro-batch; TRL's fused head averages it over
        those of a step, and so do full logits here. Evaluation is always by the fused head, or the lean one in its
        place: a card that trains can evaluate.
        """
        if not self._full_logits or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        self._count_tokens(inputs)
        inputs["use_cache"] = False
        if not self.aux_loss_enabled:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        inputs["output_router_logits"] = True  # wrappers do not ask their configuration
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss - (1 - 1 / steps) * self.router_aux_loss_coef * outputs.aux_loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, forward and backward."""
        with self._recorder.micro_batch() if self._recorder is not None else contextlib.nullcontext():
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        return loss

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        """As TRL's own `compute_loss` does: tokens seen by all processes, padding left out."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
        local = torch.as_tensor(tokens, device=self.args.device)
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(local).sum().item())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers' own, which counts the model's parameters anew for every micro-batch."""
        return 6 * int(inputs["input_ids"].numel()) * self._parameters

    @functools.cached_property
    def _parameters(self) -> int:
        model: Any = self.model
        return int(model.num_parameters(exclude_embeddings=True))

    @property
    def own_adamw(self) -> AdamW | None:
        """The optimizer where it is this project's own and not torch's; made as training begins."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # within accelerate's wrapper
        return inner if isinstance(inner, AdamW) else None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """None with gradient release: the gradients are gone, and transformers would log a norm of 0."""
        return None if self._releases else super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if len(dataset) <= LISTED_SAMPLES:
            return super()._get_train_sampler(train_dataset)
        return ComputedOrder(len(dataset), self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Left to the job, which knows the recipe and the measured peak."""

    def _take_up(self) -> None:
        """The totals of the checkpoint, and the evaluation of its step if that was cut short or never begun.

        How often to log, save and evaluate is as the recipe says now: a checkpoint's state brings its own numbers.
        """
        if self._resumed_from is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)
        totals = RunningTotals.load(self._resumed_from)
        totals.restore(self)
        self.tokens_before = totals.tokens
        if self._evaluation_is_due():
            self.evaluate()

    def _evaluation_is_due(self) -> bool:
        step, state = self.state.global_step, self.state
        due = step % int(state.eval_steps) == 0 or step >= state.max_steps
        done = any("eval_loss" in entry and entry["step"] == step for entry in state.log_history)
        return self.args.eval_strategy != "no" and due and not done

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """An epoch; a run that had reached its last step takes no further one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor | float | None, *args: Any, **kwargs: Any
    ) -> None:
        """Called after each optimizer step: it has diverged (`DivergedError`), or is good from here on."""
        if self._has_values:
            norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
            skipped = bool(self.accelerator.optimizer_step_was_skipped)
            rate = kwargs.get("learning_rate")
            self._divergence.step(self.state.global_step, tr_loss.item(), norm, rate, skipped)
        self._mark_good()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._mark_good()

    def _mark_good(self) -> None:
        """Remember all of this moment that a later checkpoint of its step needs, besides weights and optimizer."""
        if self.is_in_train and self.args.save_strategy != "no":
            self._good = (self.state.global_step, RandomState.now(), RunningTotals.of(self))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss of the evaluation set; an empty result where a signal cut it short."""
        self._mark_good()
        with self.phase("evaluate"), undisturbed():
            try:
                return dict(super().evaluate(*args, **kwargs))
            except StopEvaluation:
                self.control.should_evaluate = False
                return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter into the output folder, its files whole; into a checkpoint, as transformers does."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return

        def write(staging: Path) -> None:
            self._save(str(staging), state_dict=weights)
            self._refuse_diverged(staging)

        with self.phase("save"):
            # Sharded weights are gathered by all processes, and written by the first.
            weights = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
            if self.args.should_save:
                self._store.save_final(write)

    def _refuse_diverged(self, folder: Path) -> None:
        if self._has_values:
            self._divergence.weights(folder, self.state.global_step, self._get_learning_rate())

    def rescue(self) -> Path | None:
        """After running out of memory: a checkpoint of the last good step, or None where there is nothing to save.

        What the failed step computed is let go. Adapters and optimizer are those of the last good step, unless it was
        the optimizer's own step that failed, or a backward that had stepped weights: then the newest checkpoint stands.

        Raises:
            NotSavedError: it could not be written.
        """
        alone = self.accelerator.num_processes == 1  # others are still in the step, and would not come to save
        own = self.own_adamw
        half_stepped = self._own.stepping or (own is not None and own.half_stepped)
        if self._good is None or half_stepped or not alone:
            return None
        step, random_state, totals = self._good
        found = newest_complete(self._output_dir).checkpoint
        if found is not None and step_of(found) == step:
            return found
        model: Any = self.model
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        random_state.restore()
        totals.restore(self)
        self.state.global_step = step
        self._save_checkpoint(model, None)
        return self._output_dir / f"checkpoint-{step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Every process writes its part into the first one's staging folder."""

        def write(staging: Path) -> None:
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(staging, model, trial)
            self.accelerator.wait_for_everyone()

        with self.phase("save"):
            if self.args.should_save:
                self._store.save(self.state.global_step, write)
            else:
                write(self._store.staging)
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, staging: Path, model: Any, trial: Any) -> None:
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        finally:
            self._staging = None
        made = staging / f"checkpoint-{self.state.global_step}"
        RunningTotals.of(self).save(made)
        if self.args.should_save:
            self._refuse_diverged(made)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter's weights, from safetensors only, through host memory: no second copy of them on the card."""
        with self.phase("resume"):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            weights = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors", device="cpu")
            set_peft_model_state_dict(model or self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._resumed_from = Path(checkpoint) if checkpoint else None
        with self.phase("resume"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Record what runs inside as (part of) the phase `name`, where there is a recorder."""
        return self._recorder.phase(name) if self._recorder is not None else contextlib.nullcontext()
