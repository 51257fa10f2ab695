"""CUDA's autocast for ghost tensors, restated from its documentation.

PyTorch's own kernels cast only what lies on a CUDA device, and a ghost lies on none. These stand in their place, at the
same dispatch key, so composite operators are cast where PyTorch casts them. Left out: the cache that keeps one cast of
a trained fp32 weight until autocast ends (adapters here are bf16, or a few MiB).

Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference ("CUDA Ops that can autocast to float16",
"to float32", "that promote to the widest input type"), for the operators that these models call.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

TO_LOWER = (
    "addmm",
    "baddbmm",
    "bmm",
    "conv1d",
    "conv1d.padding",
    "einsum",
    "linear",
    "matmul",
    "mm",
)
TO_FLOAT32 = (
    "cross_entropy_loss",
    "exp",
    "layer_norm",
    "log",
    "nll_loss",
    "nll_loss_nd",
    "norm.Scalar",
    "pow.Scalar",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "reciprocal",
    "rsqrt",
    "softplus",
)
# These compute in fp32 by their own `dtype` argument, with no copy of their input.
IN_FLOAT32 = ("cumsum", "log_softmax.int", "prod", "softmax.int", "sum", "sum.dim_IntList")
TO_WIDEST = ("addcdiv", "addcmul", "dot", "index_put", "scatter_add")

_CASTABLE = (torch.float16, torch.bfloat16, torch.float32)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)  # type: ignore[attr-defined]


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    def one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_meta and tensor.dtype in _CASTABLE else tensor

    return tree_map_only(torch.Tensor, one, arguments)


def _widest(arguments: Any) -> torch.dtype:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return torch.float32 if any(tensor.dtype is torch.float32 for tensor in tensors) else torch.bfloat16


def _lower(operator: Any, args: Any, kwargs: Any) -> Any:
    return operator(*_cast(args, torch.get_autocast_dtype("cuda")), **kwargs)


def _float32(operator: Any, args: Any, kwargs: Any) -> Any:
    return operator(*_cast(args, torch.float32), **kwargs)


def _by_dtype_argument(operator: Any, args: Any, kwargs: Any) -> Any:
    lower = args[0].dtype in (torch.float16, torch.bfloat16)
    return operator(*args, **(kwargs | ({"dtype": torch.float32} if lower and kwargs.get("dtype") is None else {})))


def _promoted(operator: Any, args: Any, kwargs: Any) -> Any:
    return operator(*_cast(args, _widest(args)), **kwargs)


@contextlib.contextmanager
def autocast_of_ghosts() -> Iterator[None]:
    """Inside, `torch.autocast("cuda")` casts ghost tensors too."""
    library = torch.library.Library("aten", "IMPL")
    policies = ((TO_LOWER, _lower), (TO_FLOAT32, _float32), (IN_FLOAT32, _by_dtype_argument), (TO_WIDEST, _promoted))
    for names, policy in policies:
        for name in names:
            library.impl(name, _kernel(name, policy), "AutocastCUDA", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _kernel(name: str, policy: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return policy(operator, args, kwargs)

    return kernel
