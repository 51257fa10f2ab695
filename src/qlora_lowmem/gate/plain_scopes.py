"""Which module of anyone's model is running at every allocation, without knowing the model beforehand.

Global module hooks see every `nn.Module` that is called. The outermost one is a root, and its `named_modules()` names
the others. Autograd's nodes belong to the module that was running when they were made (their sequence numbers say
when), and are told so as `torch.autograd.backward` begins. As in `memory.scopes`, torch's metadata carries the position
in the log beside each allocation. Works on plain torch: neither transformers nor a trainer is needed.
"""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers

Phase = Literal["outside", "forward", "recompute", "backward", "optimizer"]
ModuleType = Literal["attention", "mamba", "mlp", "norm", "loss", "other"]

_set_metadata = torch._C._cuda_setMemoryMetadata
_next_sequence_number = torch._C._autograd._get_sequence_nr
_WORDS: tuple[tuple[str, ModuleType], ...] = (
    ("norm", "norm"),
    ("mamba", "mamba"),
    ("attention", "attention"),
    ("attn", "attention"),
    ("mlp", "mlp"),
    ("feedforward", "mlp"),
    ("lm_head", "loss"),
    ("loss", "loss"),
)


@dataclass(frozen=True, slots=True)
class PlainScope:
    """Where a test is.

    Attributes:
        phase: `outside` is the test's own code; `recompute` is a forward within backward.
        module: dotted name, relative to the outermost module; empty outside of modules and for the root itself.
        module_type: what kind of work it is, as far as names say.
        node: the autograd node that runs; empty in forward.
    """

    phase: Phase
    module: str = ""
    module_type: ModuleType = "other"
    node: str = ""


OUTSIDE = PlainScope("outside")


class PlainScopes:
    """Hooks on every module and optimizer of this process, and the log they keep.

    Args:
        on_step: called after outermost forwards, backwards and optimizer steps, when tensors may have got owners.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.log: list[PlainScope] = []
        self.optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._on_step = on_step
        self._roots: list[tuple[weakref.ref[nn.Module], str]] = []
        self._names: dict[int, str] = {}  # id of a module to its name; rebuilt with each outermost forward
        self._types: dict[str, ModuleType] = {}
        self._stack: list[str] = []
        self._recomputing: list[str] = []
        self._marks: list[tuple[int, PlainScope]] = []  # (autograd's next sequence number, scope from there on)
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Put the hooks on."""
        handles = [
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after, always_call=True),
            optimizers.register_optimizer_step_pre_hook(self._before_optimizer),
            optimizers.register_optimizer_step_post_hook(self._after_optimizer),
        ]
        self._undo = [handle.remove for handle in handles]
        backward = torch.autograd.backward

        def backward_with_scopes(tensors: Any, *arguments: Any, **options: Any) -> Any:
            self._mark_nodes([tensors] if isinstance(tensors, Tensor) else tensors)
            result = backward(tensors, *arguments, **options)
            if torch._C._current_graph_task_id() == -1:
                self.enter(OUTSIDE)
                self._on_step()
            return result

        torch.autograd.backward = backward_with_scopes
        self._undo.append(partial(setattr, torch.autograd, "backward", backward))
        self.enter(OUTSIDE)

    def remove(self) -> None:
        """Take the hooks off."""
        for undo in self._undo:
            undo()
        self._undo = []

    def enter(self, scope: PlainScope) -> None:
        """From now on, allocations of this thread belong to `scope`."""
        self.log.append(scope)
        _set_metadata(str(len(self.log) - 1))

    @property
    def position(self) -> int:
        """The log's next position."""
        return len(self.log)

    def scope_of(self, note: str) -> PlainScope | None:
        """The scope that an allocation's metadata names; None where there is none."""
        return self.log[int(note)] if note.isdigit() and int(note) < len(self.log) else None

    def roots(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix of its names, module) of every root that is still alive."""
        for reference, prefix in self._roots:
            root = reference()
            if root is not None:
                yield prefix, root

    def _before(self, module: nn.Module, args: Any) -> None:
        del args
        if torch._C._current_graph_task_id() != -1:
            self._recomputing.append(self._names.get(id(module), ""))
            self.enter(self._scope("recompute", self._recomputing[-1]))
            return
        if not self._stack:
            self._learn(module)
        self._stack.append(self._names.get(id(module), self._stack[-1] if self._stack else ""))
        self._mark(self._scope("forward", self._stack[-1]))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if torch._C._current_graph_task_id() != -1:
            if self._recomputing:
                self._recomputing.pop()
            self.enter(self._scope("recompute", self._recomputing[-1] if self._recomputing else ""))
            return
        if self._stack:
            self._stack.pop()
        self._mark(self._scope("forward", self._stack[-1]) if self._stack else OUTSIDE)
        if not self._stack:
            self._on_step()

    def _scope(self, phase: Phase, name: str) -> PlainScope:
        return PlainScope(phase, name, self._types.get(name, "other"))

    def _mark(self, scope: PlainScope) -> None:
        self._marks.append((_next_sequence_number(), scope))
        self.enter(scope)

    def _learn(self, module: nn.Module) -> None:
        """Name the modules of a root. The first root's names have no prefix; those of others begin with its class."""
        known = next((prefix for prefix, root in self.roots() if root is module), None)
        if known is None:
            known = "" if not self._roots else f"{type(module).__name__}."
            self._roots.append((weakref.ref(module), known))
        for name, part in module.named_modules():
            full = (known + name).removesuffix(".")
            self._names[id(part)] = full
            self._types[full] = _type_of(full, part)

    def _mark_nodes(self, tensors: Sequence[Tensor]) -> None:
        """Let every node of the graph say where it belongs when backward comes to it."""
        numbers = [number for number, _ in self._marks]
        waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        seen: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            at = bisect_right(numbers, node._sequence_nr()) - 1
            made_in = self._marks[at][1] if at >= 0 else OUTSIDE
            kind: ModuleType = "loss" if made_in.phase == "outside" else made_in.module_type
            scope = PlainScope("backward", made_in.module, kind, node.name().rpartition("::")[2])
            node.register_prehook(partial(self._enter_node, scope))
            waiting.extend(parent for parent, _ in node.next_functions if parent is not None)

    def _enter_node(self, scope: PlainScope, gradients: Any) -> None:
        del gradients
        self.enter(scope)

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if all(known() is not optimizer for known in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))
        self._on_step()
        self.enter(PlainScope("optimizer"))

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.enter(OUTSIDE)
        self._on_step()


def _type_of(name: str, module: nn.Module) -> ModuleType:
    """By the last part of its name and its class; `other` where they say nothing."""
    text = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return next((kind for word, kind in _WORDS if word in text), "other")
