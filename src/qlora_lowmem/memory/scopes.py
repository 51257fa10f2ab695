"""Which module is running, forward or backward, at every allocation.

torch's memory history knows Python frames. A backward of C++ autograd has none, and a frame does not say which of forty
layers it ran for. So hooks on the modules and on the nodes of the autograd graph keep a log of where the step is, and
torch's own metadata (`torch.cuda.memory._set_memory_metadata`) writes the log's position beside each allocation.
The metadata is thread-local, and autograd's thread runs the nodes' hooks, so both threads are covered.

A node belongs to the module that was running when it was made: the sequence numbers that autograd gives to nodes are
noted at each change of module, and the graph is walked once before backward. No tensor and no node is held.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Phase = Literal["between", "forward", "recompute", "backward", "optimizer"]
ModuleType = Literal["attention", "mamba", "mlp", "norm", "loss", "other"]

# `torch.cuda.memory._set_memory_metadata` without its Python frame: it is called 50,000 times a step.
_set_metadata = torch._C._cuda_setMemoryMetadata

_next_sequence_number = torch._C._autograd._get_sequence_nr
_ACCUMULATE = "AccumulateGrad"  # these outlive a graph, and what they allocate are gradients, known by their owner


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a step is.

    Attributes:
        phase: `recompute` is a forward within backward; `between` is outside of forward, backward and optimizer step.
        module: dotted name, PEFT's and accelerate's prefixes left out; empty outside of the model.
        module_type: what kind of work it is.
        node: the autograd node that runs (`MulBackward0`); empty in forward.
    """

    phase: Phase
    module: str = ""
    module_type: ModuleType = "other"
    node: str = ""


BETWEEN = Scope("between")


@dataclass(frozen=True, slots=True)
class _Where:
    """A module's scopes, made once."""

    forward: Scope
    recompute: Scope

    @classmethod
    def of(cls, name: str, kind: ModuleType) -> "_Where":
        return cls(Scope("forward", name, kind), Scope("recompute", name, kind))


class ScopeWindow:
    """The scopes of a stretch of the log, by the positions that allocations carry."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._scopes: list[Scope] = []

    def append(self, scope: Scope) -> int:
        """Add a scope and return its position, which only grows from window to window."""
        self._scopes.append(scope)
        return self._start + len(self._scopes) - 1

    @property
    def end(self) -> int:
        """The next position."""
        return self._start + len(self._scopes)

    def scope_of(self, note: str) -> Scope | None:
        """The scope that an allocation's metadata names.

        None for an allocation without, or with a position from before this window: its thread entered no scope since.
        """
        position = position_of(note)
        return self._scopes[position - self._start] if self._start <= position < self.end else None


def position_of(note: str) -> int:
    """The log's position in an allocation's metadata; -1 where there is none."""
    return int(note) if note.isdigit() else -1


class ScopeLog:
    """Where the step is: a log whose position is written beside every allocation."""

    def __init__(self) -> None:
        self.window = ScopeWindow(0)
        self.begin_window()

    def enter(self, scope: Scope) -> int:
        """From now on, allocations of this thread belong to `scope`. Returns the log's position."""
        position = self.window.append(scope)
        _set_metadata(str(position))
        return position

    def begin_window(self) -> ScopeWindow:
        """Forget what was logged until now, unless someone holds its window."""
        self.window = ScopeWindow(self.window.end)
        self.enter(BETWEEN)
        return self.window


class ModuleScopes:
    """Hooks that keep a `ScopeLog` for one model.

    Args:
        on_checkpoint: called with the address of the storage of a layer's input where that layer is checkpointed.
    """

    def __init__(self, model: nn.Module, log: ScopeLog, on_checkpoint: Callable[[int, int], None]) -> None:
        self._model = model
        self._log = log
        self._on_checkpoint = on_checkpoint
        self._marks: list[tuple[int, Scope]] = []  # (autograd's next sequence number, scope from there on)
        self._handles: list[Any] = []
        self._where: dict[str, _Where] = {}
        for name, _ in model.named_modules():
            self._where[name] = _Where.of(plain_name(name), module_type(model, name))

    def attach(self) -> None:
        """Put the hooks on."""
        self._marks.clear()
        for name, module in self._model.named_modules():
            inside, outside = self._where[name], self._where[name.rpartition(".")[0]]
            before = self._before_checkpointed if isinstance(module, GradientCheckpointingLayer) else self._before
            self._handles.append(module.register_forward_pre_hook(partial(before, inside), with_kwargs=True))
            after = self._after_model if module is self._model else partial(self._after, outside)
            self._handles.append(module.register_forward_hook(after))

    def remove(self) -> None:
        """Take the hooks off. Nodes that have not been through backward keep theirs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, inside: "_Where", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args, kwargs
        self._enter(inside)

    def _before_checkpointed(
        self, inside: "_Where", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if module.gradient_checkpointing and torch._C._current_graph_task_id() == -1:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self._on_checkpoint(self._log.enter(BETWEEN), hidden.untyped_storage().data_ptr())
        self._enter(inside)

    def _after(self, outside: "_Where", module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        self._enter(outside)

    def _enter(self, where: "_Where") -> None:
        if torch._C._current_graph_task_id() != -1:  # in backward
            self._log.enter(where.recompute)
        else:
            self._marks.append((_next_sequence_number(), where.forward))
            self._log.enter(where.forward)

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        self._log.enter(Scope("forward", "", "loss"))
        tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        roots = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
        if roots:
            self._mark_nodes(roots)
        self._marks.clear()

    def _mark_nodes(self, roots: list[Any]) -> None:
        """Let every node of the graph say where it belongs when backward comes to it."""
        numbers = [number for number, _ in self._marks]
        scopes: dict[tuple[int, str], Scope] = {}
        seen: set[int] = set()
        while roots:
            node = roots.pop()
            number, name = node._sequence_nr(), node.name()
            if number in seen or name.endswith(_ACCUMULATE):
                continue
            seen.add(number)
            at = bisect_right(numbers, number) - 1
            scope = scopes.get((at, name))
            if scope is None:
                made_in = self._marks[at][1] if at >= 0 else BETWEEN
                scope = Scope("backward", made_in.module, made_in.module_type, name.rpartition("::")[2])
                scopes[at, name] = scope
            node.register_prehook(partial(self._enter_node, scope))
            roots.extend(parent for parent, _ in node.next_functions if parent is not None)

    def _enter_node(self, scope: Scope, gradients: Any) -> None:
        del gradients
        self._log.enter(scope)


_WRAPPERS = ("base_model.model.", "base_model.", "module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A module's name as the base model knows it, without PEFT's wrapper."""
    if name in ("base_model", "base_model.model"):
        return ""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def module_type(model: nn.Module, name: str) -> ModuleType:
    """What kind of work the module `name` does: its own class decides, or the nearest parent's that says something.

    What runs in the model's outermost modules is the LM head and the loss; within the decoder but in none of the kinds
    (residual additions, embeddings) is `other`.
    """
    while True:
        found = _own_type(type(model.get_submodule(name)).__name__, name.rpartition(".")[2])
        if found is not None:
            return found
        if not name:
            return "loss"
        name = name.rpartition(".")[0]


def _own_type(class_name: str, leaf: str) -> ModuleType | None:
    text = class_name.lower()
    if "norm" in text:
        return "norm"
    if leaf == "lm_head" or "forcausallm" in text:
        return "loss"
    if leaf.startswith("lora_") or text.startswith("lora"):
        return None  # an adapter is part of what it adapts
    if "mamba" in text:
        return "mamba"
    if "attention" in text or leaf == "self_attn":
        return "attention"
    if text.endswith(("mlp", "moe", "experts", "router")) or leaf == "mlp":
        return "mlp"
    return "other" if text.endswith(("layer", "model", "embedding")) else None
