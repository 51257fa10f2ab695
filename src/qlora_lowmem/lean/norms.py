"""RMSNorm and the gated RMSNorm of Mamba-2, keeping their inputs as they came instead of fp32 copies.

Plain PyTorch under autograd keeps, for one token of width H, the fp32 input (4 H bytes), the fp32 normalised input
(4 H) and its bf16 copy (2 H): 10 H bytes, and the gated norm, whose gate and gated product are fp32 too, about 26 H.
Here the backward recomputes all of that from the inputs, which the layers around hold anyway, so a norm keeps nothing
of its own but one fp32 number a row (the reciprocal root mean square), 4 bytes.

Both work in blocks of rows, so that their fp32 temporaries stay below `_TEMPORARY_BYTES` each, whatever the length.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lowmem.lean.options import Idea
from qlora_lowmem.lean.tiles import spans

# One fp32 temporary of a block: 2 MiB is 341 rows of 1536 and 170 rows of 3072. The backward of the gated norm holds
# about eight of them.
_TEMPORARY_BYTES = 2 * 2**20


def row_blocks(rows: int, width: int) -> list[slice]:
    """Blocks of rows whose fp32 copy, `width` wide, stays below 2 MiB."""
    return spans(0, rows, max(1, _TEMPORARY_BYTES // (4 * width)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x ** 2) + eps)` over the last dimension, computed in fp32.

    Mirrors `GraniteMoeHybridRMSNorm.forward` of transformers (Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019, equation 4); the result is rounded once, at the end.

    x is (..., hidden) in any floating dtype, weight (hidden,); the result is in the dtype that `weight * x` has.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, weight.dtype))
        rstd = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
        for block in row_blocks(*rows.shape):
            wide = rows[block].float()
            torch.mean(wide.square(), -1, keepdim=True, out=rstd[block]).add_(eps).rsqrt_()
            out[block] = (wide * rstd[block]).mul_(weight)
        ctx.save_for_backward(x, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        rows, grads = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, x.shape[-1])
        grad_x = torch.empty_like(rows) if wants_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for block in row_blocks(*rows.shape):
            normalised, grad = rows[block] * rstd[block], grads[block].float()
            if grad_weight is not None:
                grad_weight += (grad * normalised).sum(0)
            if grad_x is not None:
                grad_x[block] = _through_normalisation(grad * weight, normalised, rstd[block])
        return (
            None if grad_x is None else grad_x.view(x.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )


def _through_normalisation(grad: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
    """With n = x * r and r = rsqrt(mean(x²) + eps): dx = r * (dn - n * mean(dn * n)), in place of `grad`."""
    return grad.sub_(normalised * (grad * normalised).mean(-1, keepdim=True)).mul_(rstd)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int, dtype: torch.dtype) -> Tensor:
    """`weight * rms_norm(x * silu(gate))`, the mean square taken over groups of `group_size` channels, in fp32.

    Mirrors `GraniteMoeHybridRMSNormGated.forward` of transformers (Dao and Gu, "Transformers are SSMs", 2024,
    section 7.1: the norm before the output projection), with `norm_before_gate=False`.

    Args:
        x: (..., width), the scan's output.
        gate: (..., width), may be a view into the input projection's output.
        weight: (width,).
        group_size: channels per group; divides width.
        dtype: of the result, the output projection's input.

    Returns:
        (..., width) in `dtype`.
    """
    return _GatedRMSNorm.apply(x, gate, weight, eps, group_size, dtype)  # type: ignore[no-any-return]


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        groups = (-1, x.shape[-1] // group_size, group_size)
        grouped_weight = weight.view(groups[1:])
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        # Batch rows apart, because a gate that is a view into a wider tensor flattens only row by row.
        for x_row, gate_row, out_row in zip(_rows(x), _rows(gate), _rows(out), strict=True):
            for block in row_blocks(*x_row.shape):
                gated = F.silu(gate_row[block].float()).mul_(x_row[block]).view(groups)
                rstd = gated.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
                out_row[block] = gated.mul_(rstd).mul_(grouped_weight).flatten(1)
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.groups = eps, groups
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x, gate, weight = ctx.saved_tensors
        eps, groups = ctx.eps, ctx.groups
        grouped_weight = weight.view(groups[1:])
        grad_x, grad_gate = torch.empty_like(x), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_weight = torch.zeros(groups[1:], device=x.device) if ctx.needs_input_grad[2] else None
        rows = zip(*map(_rows, (x, gate, grad_out, grad_x, grad_gate)), strict=True)
        for x_row, gate_row, grad_row, grad_x_row, grad_gate_row in rows:
            for block in row_blocks(*x_row.shape):
                wide, wide_gate = x_row[block].float(), gate_row[block].float()
                sigmoid = torch.sigmoid(wide_gate)
                silu = wide_gate * sigmoid
                normalised = (wide * silu).view(groups)
                rstd = normalised.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
                normalised.mul_(rstd)
                grad = grad_row[block].float().view(groups)
                if grad_weight is not None:
                    grad_weight += (grad * normalised).sum(0)
                grad = _through_normalisation(grad * grouped_weight, normalised, rstd).flatten(1)
                grad_x_row[block] = silu.mul_(grad)
                # d silu(g) / dg = s * (1 + g * (1 - s)), with s = sigmoid(g)
                slope = (wide_gate * (1 - sigmoid)).add_(1).mul_(sigmoid)
                grad_gate_row[block] = slope.mul_(wide).mul_(grad)
        return (
            grad_x,
            grad_gate,
            None if grad_weight is None else grad_weight.flatten().to(weight.dtype),
            None,
            None,
            None,
        )


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """(..., length, width) as a tuple of views (length, width)."""
    return tuple(x.flatten(0, -3)) if x.dim() > 2 else (x,)


def rms_norms_of(model: nn.Module) -> tuple[Idea, Callable[[], None]]:
    """What to say of a model's RMSNorms, and what gives those that compute what ours does our forward.

    They are tried on random rows, because families differ (Gemma multiplies by 1 + weight) and names do not say how.
    """
    known: list[tuple[Any, float]] = []
    other: set[str] = set()
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float) and _computes_rms_norm(module, eps):
            known.append((module, eps))
        else:
            other.add(type(module).__name__)

    def switch_on() -> None:
        for module, eps in known:
            module.forward = types.MethodType(functools.partial(_norm_forward, eps=eps), module)

    if not known:
        reason = f"no RMSNorm that is known ({', '.join(sorted(other)) or 'none in the model'})"
        return Idea("rms_norm", False, reason), switch_on
    rest = f"; not known: {', '.join(sorted(other))}" if other else ""
    return Idea("rms_norm", True, f"{len(known)} norms{rest}"), switch_on


def _norm_forward(self: Any, hidden_states: Tensor, *, eps: float) -> Tensor:
    return rms_norm(hidden_states, self.weight, eps)


@torch.no_grad()
def _computes_rms_norm(module: Any, eps: float) -> bool:
    """Tried in host memory, with weights of its own: a virtual GPU and a module on the meta device have no values."""
    generator = torch.Generator().manual_seed(0)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Weights of one cannot tell w from another function of w that is one there.
    tried = {name: (torch.rand(t.shape, generator=generator) + 0.5).to(t.dtype) for name, t in state.items()}
    weight = tried["weight"]
    rows = torch.randn(4, weight.shape[-1], generator=generator).to(weight.dtype)
    found = torch.func.functional_call(module, tried, (rows,))
    return torch.allclose(found.float(), rms_norm(rows, weight, eps).float(), rtol=2e-2, atol=1e-3)
