"""One optimizer step of a recipe's job as a function of no arguments, to be timed."""

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import recipe_from_dict, replace_field
from qlora_lowmem.run.job import build_job, device_of
from qlora_lowmem.run.preflight import inputs_of, preflight, tokenised

# Synthetic samples never end: the same ones come again.
_STEPS_OF_DATA = 2


class TrainingSteps:
    """A recipe's job on `cuda`, stepped by hand: what transformers' trainer does in a step, and no more.

    A step is `gradient_accumulation_steps` calls of the trainer's own `training_step`, the clipping of gradients, the
    optimizer's step, its gradients let go, and `torch.cuda.synchronize()`. Loading of data and logging stay out.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """Load the job; may raise `torch.cuda.OutOfMemoryError`."""
        recipe = replace_field(recipe, "max_steps", _STEPS_OF_DATA)
        self.recipe = recipe
        checked = preflight(inputs_of(recipe), supports_bf16=device_of(recipe)[1])
        job = build_job(checked, tokenised(checked, None), [], folder, save=False)
        self._trainer = job.trainer
        if recipe.memory.gradient_checkpointing:
            self._trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        self._trainer.create_optimizer()
        self._model, self._optimizer = self._trainer.accelerator.prepare(self._trainer.model, self._trainer.optimizer)
        self._trainer.model_wrapped, self._trainer.optimizer = self._model, self._optimizer
        self._batches = iter(())
        self.steps = 0

    @property
    def tokens(self) -> int:
        """Tokens that one step trains on."""
        batch = self.recipe.batch
        return batch.batch_size * batch.gradient_accumulation_steps * batch.max_seq_length

    def step(self) -> None:
        """One optimizer step, waited for."""
        accumulation = self.recipe.batch.gradient_accumulation_steps
        batches, items = self._trainer.get_batch_samples(self._next_batches(), accumulation, torch.device("cuda", 0))
        self._trainer.current_gradient_accumulation_steps = len(batches)
        for index, batch in enumerate(batches):
            self._trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
            self._trainer.training_step(self._model, batch, items)
        if self.recipe.optimizer.max_grad_norm:
            self._trainer.accelerator.clip_grad_norm_(self._model.parameters(), self.recipe.optimizer.max_grad_norm)
        self._optimizer.step()
        self._model.zero_grad()
        torch.cuda.synchronize()
        self.steps += 1

    def _next_batches(self) -> Any:
        """The loader's iterator, begun again when a step could not be filled from it."""
        if self.steps % _STEPS_OF_DATA == 0:
            self._batches = iter(self._trainer.get_train_dataloader())
        return self._batches

    def close(self) -> None:
        """Let go of everything on the card."""
        self._trainer.accelerator.free_memory()
        self.__dict__.clear()
        free_memory()


def free_memory() -> None:
    """Collect what Python still holds and give the caching allocator's segments back to the card."""
    gc.collect()
    torch.cuda.empty_cache()


def peaks_of_steps(content: dict[str, Any], steps: int) -> dict[str, Any]:
    """In a worker: the allocated peak of each step, and what is left on the card after `close`, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingSteps(recipe_from_dict(content), Path(folder))
        peaks = []
        for _ in range(steps):
            torch.cuda.reset_peak_memory_stats()
            training.step()
            peaks.append(torch.cuda.max_memory_allocated())
        found = {"peaks": peaks, "tokens": training.tokens, "steps": training.steps}
        training.close()
    return found | {"left": torch.cuda.memory_allocated()}
