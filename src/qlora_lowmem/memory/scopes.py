"""Which module is running, forward or backward, at every allocation.

torch's memory history knows Python frames. A backward of C++ autograd has none, and a frame does not say which of forty
layers it ran for. So hooks on the modules and on the nodes of the autograd graph keep a log of where the job is, and
torch's own metadata (`torch.cuda.memory._set_memory_metadata`) writes the log's position beside each allocation.
The metadata is thread-local, and autograd's thread runs the nodes' hooks, so both threads are covered.

A node belongs to the module that was running when it was made: the sequence numbers that autograd gives to nodes are
noted at each change of module, and the graph is walked once before backward. No tensor and no node is held.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.optim import optimizer as optimizers

from qlora_lowmem.memory.kinds import ModuleType, module_type, plain_name, type_by_words

Phase = Literal["between", "outside", "forward", "recompute", "backward", "optimizer"]

# `torch.cuda.memory._set_memory_metadata` without its Python frame: it is called 50,000 times a step.
_set_metadata = torch._C._cuda_setMemoryMetadata

_next_sequence_number = torch._C._autograd._get_sequence_nr
_ACCUMULATE = "AccumulateGrad"  # these outlive a graph, and what they allocate are gradients, known by their owner


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a job is.

    Attributes:
        phase: `recompute` is a forward within backward; `between` is outside of a recipe's forward, backward and
            optimizer step, `outside` the same in a program, in its own code.
        module: dotted name, PEFT's and accelerate's prefixes left out; empty outside of the model. In a program
            relative to the outermost module, which has no name itself.
        module_type: what kind of work it is.
        node: the autograd node that runs (`MulBackward0`); empty in forward.
        module_class: the name of the module's class; empty where there is no module.
    """

    phase: Phase
    module: str = ""
    module_type: ModuleType = "other"
    node: str = ""
    module_class: str = ""


BETWEEN = Scope("between")
OUTSIDE = Scope("outside")


class Scopes:
    """Hooks that keep a log of where a job is; `idle` is the scope outside of all that is followed."""

    def __init__(self, idle: Scope) -> None:
        self._idle = idle
        self._undo: list[Callable[[], None]] = []
        self._marks: list[tuple[int, Scope]] = []  # (autograd's next sequence number, scope from there on)
        self.end = 0  # the next position, which only grows from window to window
        self.window = self.begin_window()

    def begin_window(self) -> dict[int, Scope]:
        """Scopes by position from now on; an allocation may name one from before, if its thread entered none since."""
        self.window = {}
        self._marks.clear()
        self.enter(self._idle)
        return self.window

    def enter(self, scope: Scope) -> int:
        """From now on, allocations of this thread belong to `scope`. Returns the log's position."""
        position, self.end = self.end, self.end + 1
        self.window[position] = scope
        _set_metadata(str(position))
        return position

    def remove(self) -> None:
        """Take the hooks off. Nodes that have not been through backward keep theirs."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _enter_forward(self, scope: Scope) -> None:
        """Enter it, and let the nodes that autograd makes from now on belong to it too."""
        self._marks.append((_next_sequence_number(), scope))
        self.enter(scope)

    def _mark_nodes(self, ends: Iterable[Any]) -> None:
        """Let every node of the graphs behind `ends` say where it belongs when backward comes to it."""
        numbers = [number for number, _ in self._marks]
        scopes: dict[tuple[int, str], Scope] = {}
        waiting = [end.grad_fn for end in ends if isinstance(end, Tensor) and end.grad_fn is not None]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            name = node.name()
            if node in seen or name.endswith(_ACCUMULATE):
                continue
            seen.add(node)
            at = bisect_right(numbers, node._sequence_nr()) - 1
            scope = scopes.get((at, name))
            if scope is None:
                made_in = self._marks[at][1] if at >= 0 else self._idle
                kind: ModuleType = "loss" if made_in.phase == "outside" else made_in.module_type
                scope = Scope("backward", made_in.module, kind, name.rpartition("::")[2], made_in.module_class)
                scopes[at, name] = scope
            node.register_prehook(partial(self._enter_node, scope))
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)

    def _enter_node(self, scope: Scope, _gradients: Any) -> None:
        self.enter(scope)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class ModelScopes(Scopes):
    """Hooks on one model that is known beforehand, a recipe's.

    Where a layer is checkpointed, `on_checkpoint` gets the log's position and the address of its input's storage.
    """

    def __init__(self, model: nn.Module, on_checkpoint: Callable[[int, int], None]) -> None:
        super().__init__(BETWEEN)
        self._model = model
        self._on_checkpoint = on_checkpoint
        self._scopes: dict[str, tuple[Scope, Scope]] = {}  # of a module's forward, and of its recomputation
        for name, module in model.named_modules():
            where = plain_name(name), module_type(model, name), "", type(module).__name__
            self._scopes[name] = Scope("forward", *where), Scope("recompute", *where)

    def attach(self) -> None:
        """Put the hooks on."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        for name, module in self._model.named_modules():
            inside, outside = self._scopes[name], self._scopes[name.rpartition(".")[0]]
            before = self._before_checkpointed if isinstance(module, GradientCheckpointingLayer) else self._enter_module
            after = self._after_model if module is self._model else partial(self._enter_module, outside)
            self._undo.append(module.register_forward_pre_hook(partial(before, inside), with_kwargs=True).remove)
            self._undo.append(module.register_forward_hook(after).remove)

    def _before_checkpointed(
        self, inside: tuple[Scope, Scope], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if module.gradient_checkpointing and not _in_backward():
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self._on_checkpoint(self.enter(BETWEEN), hidden.untyped_storage().data_ptr())
        self._enter_module(inside)

    def _enter_module(self, scopes: tuple[Scope, Scope], *_: Any) -> None:
        forward, recompute = scopes
        if _in_backward():
            self.enter(recompute)
        else:
            self._enter_forward(forward)

    def _after_model(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.enter(Scope("forward", "", "loss"))
        outputs = output.values() if isinstance(output, dict) else output
        self._mark_nodes(outputs if not isinstance(outputs, Tensor) else [outputs])


class ProgramScopes(Scopes):
    """Hooks on every module and optimizer that a program on plain torch uses.

    The outermost module that is called is a root, and its `named_modules()` names the others. Nodes are marked as
    `torch.autograd.backward` begins. `on_step` is called after outermost forwards, backwards and optimizer steps, when
    tensors may have got owners.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        super().__init__(OUTSIDE)
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._on_step = on_step
        self._roots: list[tuple[weakref.ref[nn.Module], str]] = []
        self._names: dict[int, str] = {}  # id of a module to its name; rebuilt with each outermost forward
        self._types: dict[str, tuple[ModuleType, str]] = {}  # with the name of its class
        self._running: list[str] = []
        self._recomputing: list[str] = []

    def attach(self) -> None:
        """Put the hooks on."""
        handles = [
            global_hooks.register_module_forward_pre_hook(self._before),
            global_hooks.register_module_forward_hook(self._after, always_call=True),
            optimizers.register_optimizer_step_pre_hook(self._before_optimizer),
            optimizers.register_optimizer_step_post_hook(self._after_optimizer),
        ]
        backward = torch.autograd.backward

        def backward_with_scopes(tensors: Any, *arguments: Any, **options: Any) -> Any:
            self._mark_nodes([tensors] if isinstance(tensors, Tensor) else tensors)
            result = backward(tensors, *arguments, **options)
            if not _in_backward():
                self.enter(OUTSIDE)
                self._on_step()
            return result

        torch.autograd.backward = backward_with_scopes
        self._undo = [*(handle.remove for handle in handles), partial(setattr, torch.autograd, "backward", backward)]
        self.begin_window()

    def roots(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix of its names, module) of every root that is still alive."""
        for reference, prefix in self._roots:
            root = reference()
            if root is not None:
                yield prefix, root

    def _before(self, module: nn.Module, _args: Any) -> None:
        stack = self._recomputing if _in_backward() else self._running
        if not stack and stack is self._running:
            self._learn(module)
        around = stack[-1] if stack and stack is self._running else ""
        stack.append(self._names.get(id(module), around))
        self._enter_innermost(stack)

    def _after(self, *_: Any) -> None:
        stack = self._recomputing if _in_backward() else self._running
        if stack:
            stack.pop()
        self._enter_innermost(stack)
        if not stack and stack is self._running:
            self._on_step()

    def _enter_innermost(self, stack: list[str]) -> None:
        name = stack[-1] if stack else ""
        kind, its_class = self._types.get(name, ("other", ""))
        if stack is self._recomputing:
            self.enter(Scope("recompute", name, kind, "", its_class))
        else:
            self._enter_forward(Scope("forward", name, kind, "", its_class) if stack else OUTSIDE)

    def _learn(self, module: nn.Module) -> None:
        """Name the modules of a root. The first root's names have no prefix; those of others begin with its class."""
        known = next((prefix for prefix, root in self.roots() if root is module), None)
        if known is None:
            known = "" if not self._roots else f"{type(module).__name__}."
            self._roots.append((weakref.ref(module), known))
        for name, part in module.named_modules():
            full = (known + name).removesuffix(".")
            self._names[id(part)] = full
            self._types[full] = type_by_words(full, part), type(part).__name__

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if all(known() is not optimizer for known in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))
        self._on_step()
        self.enter(Scope("optimizer"))

    def _after_optimizer(self, *_: Any) -> None:
        self.enter(OUTSIDE)
        self._on_step()
