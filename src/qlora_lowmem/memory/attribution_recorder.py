"""Record what an attribution needs while a recipe trains, on a real and a virtual GPU alike.

The allocator's history is recorded in windows of one micro-batch (the last with the optimizer step), and a window is
looked at only if the phase's allocated peak rose in it. Nothing is allocated on the device, and no tensor is held.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.cuda import memory as cuda_memory
from transformers import Trainer, TrainerCallback

from qlora_lowmem.memory.attribution import Attribution, Evidence, explain
from qlora_lowmem.memory.history import replay
from qlora_lowmem.memory.kinds import RecipeNamer
from qlora_lowmem.memory.owners import Found, Owner, Owners
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.recorder import begin_history, library_workspaces, no_collection, snapshot_file, take_snapshot
from qlora_lowmem.memory.scopes import BETWEEN, ModelScopes, Scope

_WORKSPACE = Owner("libraries", "cuBLAS workspace", "")
_CHECKPOINT = Owner("checkpoints", "input of a decoder layer", "")


class AttributionRecorder(TrainerCallback):
    """The trainer's callback that records the steady steps; the first step where there is no other.

    Call `start` before the model is loaded, `watch` when it is, and `finish` after training. CUDA device 0 is looked
    at, and all micro-batches must have the same shape: a step's peak then comes in its first, its second (there are
    gradients then) or its last (with the optimizer step), and only these are recorded. If it comes in another all the
    same, what was higher there is `unexplained`.
    """

    _trainer: Trainer
    _model: nn.Module
    _scopes: ModelScopes

    def __init__(self) -> None:
        self._namer = RecipeNamer()
        self._owners = Owners(self._namer)
        self._hooks: list[Any] = []
        self._micro_batch = 0
        self._phase = ""
        self._open: tuple[dict[str, Any], Evidence] | None = None
        self._best = 0
        self._kept: tuple[dict[str, Any], dict[str, Any], Evidence] | None = None

    def start(self) -> None:
        """Begin to note, for every block, the Python frames of its allocation."""
        cuda_memory._record_memory_history("state", context="state", stacks="python", clear_history=True)

    def watch(self, trainer: Trainer) -> None:
        """Put hooks on the trainer's model, and learn what its weights are."""
        assert isinstance(trainer.model, nn.Module)
        self._trainer, self._model = trainer, trainer.model
        self._weights = _first_of(self._owners.weights(self._model))
        self._scopes = ModelScopes(self._model, self._saw_checkpoint)
        _, options = trainer.optimizer_cls_and_kwargs or (None, {})
        if options.get("gradient_release"):
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    # The optimizer's own hook, which frees the gradient, comes later: it is made as training begins.
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._saw_gradient, name)))
        trainer.add_callback(self)

    def finish(self, profile: MemoryProfile) -> Attribution | None:
        """Stop, and attribute the recorded phase's peak in `profile`; None if no step was recorded."""
        cuda_memory._record_memory_history(None)
        for hook in self._hooks:
            hook.remove()
        if self._kept is None:
            return None
        before, after, evidence = self._kept
        workspaces = dict.fromkeys(library_workspaces(), _WORKSPACE)
        evidence.at_start = {**workspaces, **evidence.at_start}
        evidence.at_end = {**workspaces, **evidence.at_end}
        with no_collection():
            return explain(replay(before, after), evidence, self._namer, profile, self._phase)

    def snapshot(self) -> bytes:
        """The window that `finish` attributed, as a file of it (`snapshot_file`)."""
        assert self._kept is not None
        return snapshot_file(self._kept[1])

    def on_step_begin(self, *event: Any, **__: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        args, state, _ = event
        self._micro_batch, self._micro_batches = 0, args.gradient_accumulation_steps
        only_one = state.max_steps == 1
        if state.global_step > 0 or only_one:
            self._phase = "first step" if only_one else "steady"
            self._begin_window()
        else:
            cuda_memory._record_memory_history(None)  # what a step leaves behind has owners, and the frames cost time

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Between two micro-batches."""
        self._micro_batch += 1
        self._end_window()
        if self._phase and self._micro_batch in (1, self._micro_batches - 1):
            self._begin_window()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are complete, and soon gone."""
        self._saw(self._owners.gradients(self._model))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the optimizer's step, before gradients are let go."""
        self._scopes.enter(BETWEEN)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After everything of a step."""
        self._end_window()
        self.start()

    def _begin_window(self) -> None:
        self._scopes.attach()
        self._best = max(self._best, torch.cuda.max_memory_allocated())  # what came where none was recorded
        evidence = Evidence(self._scopes.begin_window(), self._alive())
        self._open = (begin_history(), evidence)

    def _end_window(self) -> None:
        if self._open is None:
            return
        self._scopes.remove()
        before, evidence = self._open
        self._open = None
        peak = torch.cuda.max_memory_allocated()
        if peak > self._best:
            self._best = peak
            evidence.at_end = self._alive()
            self._kept = before, take_snapshot(), evidence
        cuda_memory._record_memory_history(None)

    def _alive(self) -> dict[int, Owner]:
        optimizer = self._trainer.optimizer  # made as training begins, and then wrapped by accelerate
        inner = getattr(optimizer, "optimizer", optimizer)
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        state, gradients = self._owners.optimizer_state(inner, names), self._owners.gradients(self._model)
        return {**_first_of(state), **_first_of(gradients), **self._weights}

    def _saw_gradient(self, name: str, parameter: nn.Parameter) -> None:
        """Within backward, a gradient that the optimizer now steps with and frees."""
        self._saw(self._owners.gradient(name, parameter))

    def _saw(self, gradients: Found) -> None:
        if self._open is not None:
            position = self._scopes.enter(Scope("optimizer"))
            self._open[1].seen.extend((position, address, owner) for address, owner in gradients)

    def _saw_checkpoint(self, position: int, address: int) -> None:
        if self._open is not None:
            self._open[1].seen.append((position, address, _CHECKPOINT))


def _first_of(found: Found) -> dict[int, Owner]:
    """By address; of several tensors in one storage the first."""
    return dict(reversed(list(found)))
