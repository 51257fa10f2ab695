"""LoRA on a frozen linear layer as one operation: `y = x Wᵀ + s (x Aᵀ) Bᵀ`.

PEFT's layer clones the base layer's output, makes the adapter's own of the same size, scales it and adds the two: four
tensors of the output's size and five launches beside the product with W; under autograd as many again, and x's gradient
is a sum of two more. Here the adapter's product is added as it is computed (`addmm` with a factor), forward into the
output and backward into x's gradient: one tensor, two launches forward and four backward. Kept for backward: x and
x Aᵀ, rank numbers a token.

W is what the base layer is: 4 bits, dequantised by tiles as `linear4bit.py` does, or a plain frozen weight. Whatever is
not plain LoRA with one adapter (dropout in training, DoRA, several adapters, merged or switched off) stays with PEFT.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lowmem.lean.linear4bit import tiled_weight
from qlora_lowmem.lean.options import Idea

_LAYERS = ("Linear", "Linear4bit")  # of PEFT's LoRA


class Weight(Protocol):
    """A frozen weight (out_features, in_features)."""

    def product(self, rows: Tensor) -> Tensor:
        """`rows @ W.T`, a new tensor (rows, out_features)."""

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ W`, a new tensor (rows, in_features)."""


@dataclass(frozen=True)
class _DenseWeight:
    weight: Tensor
    bias: Tensor | None

    def product(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight, self.bias)

    def back(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


@dataclass(frozen=True)
class _Adapter:
    """What a call of a layer computes with; a (rank, in_features) and b (out_features, rank) are its parameters."""

    base: Weight
    a: Tensor
    b: Tensor
    scaling: float
    dtype: torch.dtype  # of all products


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, adapter: _Adapter) -> Tensor:
        dtype = adapter.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = adapter.base.product(rows)
            inner = rows @ a.to(dtype).t()
            out.addmm_(inner, b.to(dtype).t(), alpha=adapter.scaling)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.adapter, ctx.shape, ctx.dtype = adapter, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, inner, a, b = ctx.saved_tensors
        adapter: _Adapter = ctx.adapter
        wants_x, wants_a, wants_b, _ = ctx.needs_input_grad
        dtype, scaling = adapter.dtype, adapter.scaling
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad_out.device.type, enabled=False):
            grad = grad_out.reshape(-1, grad_out.shape[-1])
            if wants_b:
                grad_b = _scaled_product(grad.t(), inner, scaling).to(b.dtype)
            grad_inner = _scaled_product(grad, b.to(dtype), scaling)
            if wants_a:
                grad_a = (grad_inner.t() @ rows).to(a.dtype)
            if wants_x:
                del rows
                grad_x = adapter.base.back(grad)
                grad_x.addmm_(grad_inner, a.to(dtype))
                grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
        return grad_x, grad_a, grad_b, None


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """`scaling * left @ right` in one launch."""
    ignored = left.new_empty(1, 1).expand(left.shape[0], right.shape[1])  # with beta 0 it is not read
    return torch.addmm(ignored, left, right, beta=0, alpha=scaling)


def patch_adapters(model: nn.Module, tile_bytes: int) -> Idea | None:
    """Give PEFT's LoRA layers on linear layers the forward of this module; None where the model has none."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module).__name__ in _LAYERS and type(module).__module__.startswith("peft.tuners.lora.")
    ]
    for layer in layers:
        layer._plain_forward = layer.__dict__.get("_plain_forward") or layer.forward
        layer.forward = types.MethodType(functools.partial(_forward, tile_bytes=tile_bytes), layer)
    return Idea("adapters", True, f"{len(layers)} LoRA layers, each added as it is computed") if layers else None


def _forward(self: Any, x: Tensor, *args: Any, tile_bytes: int, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _adapter_of(self, x, tile_bytes)
    if adapter is None:
        # Asked of the instance: a copy of the model has its own.
        return self._plain_forward(x, *args, **kwargs)  # type: ignore[no-any-return]
    return _Adapted.apply(x, adapter.a, adapter.b, adapter)  # type: ignore[no-any-return]


def _adapter_of(layer: Any, x: Tensor, tile_bytes: int) -> _Adapter | None:
    """What a call with x computes with; None where it is more than plain LoRA, or PEFT would cast between dtypes."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    name = active[0]
    inner, outer, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drops = not isinstance(dropout, nn.Identity) and dropout.training and dropout.p > 0
    biased = inner.bias is not None or outer.bias is not None
    if drops or biased or name in layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        return None
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if not autocast and not inner.weight.dtype == outer.weight.dtype == dtype:
        return None
    base = _frozen_weight(layer.base_layer, x, dtype, tile_bytes)
    return None if base is None else _Adapter(base, inner.weight, outer.weight, layer.scaling[name], dtype)


def _frozen_weight(base: Any, x: Tensor, dtype: torch.dtype, tile_bytes: int) -> Weight | None:
    if type(base) is nn.Linear:
        weight, bias = base.weight, base.bias
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        return _DenseWeight(weight, bias) if frozen and weight.dtype == dtype else None
    if "_plain_forward" not in base.__dict__ or (base.compute_dtype or dtype) != dtype:
        return None
    return tiled_weight(base, x.numel() // x.shape[-1], dtype, tile_bytes)
