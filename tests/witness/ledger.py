"""The ledger: every storage from its creation until it is let go, and what was alive when most was."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# The CUDA caching allocator rounds every request up to this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
ALLOCATION_UNIT = 512
# What made the tensors that were there before the first step.
MODEL = "the model"


class GhostTensor(torch.Tensor):
    """A meta tensor that autograd and autocast take for a CUDA tensor. Operators on it compute shapes only.

    It is on the device `meta`, so nothing asks a GPU for anything, and has the dispatch keys of CUDA, so the casts that
    autocast makes on a GPU are made here.
    """

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> "GhostTensor":
        return torch.Tensor._make_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, meta, meta.requires_grad, device_for_backend_keys=torch.device("cuda")
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a ghost tensor outside of a ledger")


@dataclass(frozen=True)
class Holding:
    """One storage: its bytes as the allocator rounds them, the operator that made it, its shape and dtype."""

    size: int
    operator: str
    shape: tuple[int, ...]
    dtype: str


# What an operator takes and gives back before it returns: (operator, arguments, result) -> bytes of each piece.
Temporaries = Callable[[str, tuple[Any, ...], Any], list[int]]


@dataclass(frozen=True)
class Peak:
    """The most that was alive at once, and what it was."""

    size: int
    holdings: tuple[Holding, ...]

    def by_operator(self) -> Counter[str]:
        """Bytes alive at the peak by the operator that made them."""
        totals: Counter[str] = Counter()
        for holding in self.holdings:
            totals[holding.operator] += holding.size
        return totals


@dataclass
class _Life:
    """A holding, and the numbers of the calls in which it began and ended."""

    holding: Holding
    born: int
    died: int | None = None


class Account:
    """Storages by their life, the bytes alive now, and the peak of the phase."""

    def __init__(self) -> None:
        self._live: dict[int, _Life] = {}
        self._lives: list[_Life] = []
        self._calls = 0
        self.now = 0
        self._peak, self._peak_call = 0, 0
        self._peak_inside: list[Holding] = []

    def begin_phase(self) -> None:
        """Forget the peak and what is over; what is alive stays."""
        self._lives = list(self._live.values())
        self._peak, self._peak_call, self._peak_inside = self.now, self._calls, []

    def peak(self) -> Peak:
        """The highest since the phase began."""
        call = self._peak_call
        alive = [life.holding for life in self._lives if life.born <= call and (life.died is None or life.died > call)]
        return Peak(self._peak, (*alive, *self._peak_inside))

    def hold(self, tensor: torch.Tensor, operator: str) -> None:
        """Account the tensor's storage, unless it is already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or storage.nbytes() == 0:
            return
        holding = Holding(rounded(storage.nbytes()), operator, tuple(tensor.shape), str(tensor.dtype))
        life = self._live[key] = _Life(holding, self._calls)
        self._lives.append(life)
        self.now += holding.size
        weakref.finalize(storage, self._let_go, key)

    def hold_model(self, model: nn.Module) -> None:
        """Account parameters, buffers and quantisation constants under `MODEL`, whatever made them."""
        for tensor in tensors_of(model):
            self.hold(tensor, MODEL)
            life = self._live[tensor.untyped_storage()._cdata]
            life.holding = replace(life.holding, operator=MODEL)

    def _let_go(self, key: int) -> None:
        life = self._live.pop(key)
        life.died = self._calls
        self.now -= life.holding.size

    def count(self, operator: str, results: Any, temporaries: list[int]) -> None:
        """Account a call: what came out, and what it took for itself while it ran."""
        for leaf in (results,) if isinstance(results, torch.Tensor) else tree_leaves(results):
            if isinstance(leaf, torch.Tensor) and leaf.device.type in ("meta", "cuda"):
                self.hold(leaf, operator)
        size = self.now + sum(map(rounded, temporaries))
        if size > self._peak:
            self._peak, self._peak_call = size, self._calls
            self._peak_inside = [Holding(rounded(each), f"inside {operator}", (each,), "bytes") for each in temporaries]
        self._calls += 1


class GhostLedger(TorchDispatchMode):
    """While it is the active dispatch mode, operators compute shapes only, and `account` has every storage.

    `temporaries` says what operators that are one call here allocate inside on a GPU.
    """

    def __init__(self, account: Account, temporaries: Temporaries) -> None:
        super().__init__()
        self._account = account
        self._temporaries = temporaries

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # the one question of the step: whether all of the attention mask is set. A full batch's is
        if func is torch.ops.aten.nonzero.default:
            # Which positions are scored depends on data. The worst case, as on the virtual GPU: every one.
            result: Any = torch.empty((args[0].numel(), args[0].dim()), dtype=torch.long, device="meta")
        elif func is torch.ops.aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            result = _index_by_masks(args[0], args[1])
        else:
            result = _on_meta(func, args, kwargs) if GhostTensor in types else func(*args, **kwargs)
        result = as_ghost(result) if isinstance(result, torch.Tensor) else tree_map_only(torch.Tensor, as_ghost, result)
        self._account.count(name, result, self._temporaries(name, args, result))
        return result


def rounded(size: int) -> int:
    """A request as the allocator counts it."""
    return -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT


def as_ghost(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a ghost, its storage the same; what is one already, or is not a plain meta tensor, stays."""
    if isinstance(tensor, GhostTensor) or type(tensor) is not torch.Tensor or not tensor.is_meta:
        return tensor
    return GhostTensor(tensor)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the operator's kernel for meta tensors, whatever dispatch keys its arguments have."""
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        torch._C._set_meta_in_tls_dispatch_include(True)
        return func(*args, **kwargs)


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and the quantisation constants of 4-bit weights."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            yield from _constants(module.quant_state)


def _constants(state: Any) -> list[torch.Tensor]:
    nested = [state.offset, *_constants(state.state2)] if state.nested else []
    return [state.absmax, state.code, *nested]


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _index_by_masks(tensor: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """`tensor[mask]` with every position selected: (positions, *rest)."""
    (mask,) = [index for index in indices if index is not None]
    shape = (mask.numel(), *tensor.shape[mask.dim() :])
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
