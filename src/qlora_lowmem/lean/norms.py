"""RMSNorm and the gated RMSNorm of Mamba-2, keeping their inputs as they came instead of fp32 copies.

Plain PyTorch under autograd keeps, for one token of width H, the fp32 input (4 H bytes), the fp32 normalised input
(4 H) and its bf16 copy (2 H): 10 H bytes, and the gated norm, whose gate and gated product are fp32 too, about 26 H.
Here the backward recomputes all of that from the inputs, which the layers around hold anyway, so a norm keeps nothing
of its own but one fp32 number a row (the reciprocal root mean square), 4 bytes.

On a GPU PyTorch's own kernel normalises rows in one launch, forward and backward, without a temporary. What it does not
take, and a CPU, gets plain operators. Those, and what the gate adds, work in blocks of rows, so that an fp32 temporary
stays below `_TEMPORARY_BYTES`, whatever the length; a tile is one block.
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

# One fp32 temporary of a block: 24 MiB is 4,096 rows of 1536 and 2,048 of 3072. The backward of the gated norm holds
# four of them.
_TEMPORARY_BYTES = 24 * 2**20


def row_blocks(rows: int, width: int) -> list[slice]:
    """Blocks of rows whose fp32 copy, `width` wide, stays below `_TEMPORARY_BYTES`."""
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
        ctx.fused = _fuses(x) and x.dtype == weight.dtype
        normalise = _fused_forward if ctx.fused else _plain_forward
        out, rstd = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        back = _fused_backward if ctx.fused else _plain_backward
        return *back(grad_out, x, weight, rstd, wanted), None


_Gradients = tuple[Tensor | None, Tensor | None]


def _fuses(x: Tensor) -> bool:
    """Whether PyTorch has its kernel for x: only on CUDA does it have a backward."""
    return x.is_cuda


def _fused_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and the reciprocal root mean square of each (..., 1) in fp32."""
    return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)  # type: ignore[no-any-return]


def _fused_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, wanted: tuple[bool, bool]
) -> _Gradients:
    found = torch.ops.aten._fused_rms_norm_backward(grad_out, x, [x.shape[-1]], rstd, weight, list(wanted))
    return found[0] if wanted[0] else None, found[1] if wanted[1] else None


def _plain_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, dtype=x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))
    rstd = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
    for block in row_blocks(*rows.shape):
        wide = rows[block].float()
        torch.mean(wide.square(), -1, keepdim=True, out=rstd[block]).add_(eps).rsqrt_()
        normalised = wide * rstd[block]
        out[block] = normalised if weight is None else normalised.mul_(weight)
    return out.view(x.shape), rstd


def _plain_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, wanted: tuple[bool, bool]
) -> _Gradients:
    rows, grads = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, x.shape[-1])
    grad_x = torch.empty_like(rows) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] and weight is not None else None
    for block in row_blocks(*rows.shape):
        normalised, grad = rows[block] * rstd[block], grads[block].float()
        if grad_weight is not None:
            grad_weight += (grad * normalised).sum(0)
        if grad_x is not None:
            # With n = x * r and r = rsqrt(mean(x²) + eps): dx = r * (dn - n * mean(dn * n)).
            grad = grad.clone() if weight is None else grad * weight
            grad.sub_(normalised * (grad * normalised).mean(-1, keepdim=True))
            grad_x[block] = grad.mul_(rstd[block])
    return (
        None if grad_x is None else grad_x.view(x.shape),
        None if grad_weight is None or weight is None else grad_weight.to(weight.dtype),
    )


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int, dtype: torch.dtype) -> Tensor:
    """`weight * rms_norm(x * silu(gate))`, the mean square taken over groups of `group_size` channels, in fp32.

    Mirrors `GraniteMoeHybridRMSNormGated.forward` of transformers (Dao and Gu, "Transformers are SSMs", 2024,
    section 7.1: the norm before the output projection), with `norm_before_gate=False`.

    Args:
        x: (..., seq, width), the scan's output.
        gate: as x, may be a view into the input projection's output.
        weight: (width,).
        group_size: channels per group; divides width.
        dtype: of the result, the output projection's input.

    Returns:
        (..., seq, width) in `dtype`.
    """
    return _GatedRMSNorm.apply(x, gate, weight, eps, group_size, dtype)  # type: ignore[no-any-return]


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        groups = (x.shape[-1] // group_size, group_size)
        normalise = _fused_forward if _fuses(x) else _plain_forward
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstds = []
        for block in _blocks(x):
            gated = F.silu(gate[block].to(torch.float32, copy=True), inplace=True).mul_(x[block])
            normalised, rstd = normalise(gated.unflatten(-1, groups), None, eps)
            torch.mul(normalised.flatten(-2), weight, out=out[block])
            rstds.append(rstd)
        ctx.save_for_backward(x, gate, weight, *rstds)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x, gate, weight, *rstds = ctx.saved_tensors
        groups = ctx.groups
        back = _fused_backward if _fuses(x) else _plain_backward
        wide_weight = weight.float()
        parts: list[tuple[Tensor, Tensor]] = []
        grad_weight = torch.zeros_like(wide_weight) if ctx.needs_input_grad[2] else None
        for block, rstd in zip(_blocks(x), rstds, strict=True):
            wide_gate = gate[block].float()
            silu = F.silu(wide_gate)
            gated = (silu * x[block]).unflatten(-1, groups)
            if grad_weight is not None:
                normalised = (gated * rstd.view(*gated.shape[:-1], 1)).flatten(-2)
                grad_weight += (normalised * grad_out[block]).flatten(0, -2).sum(0)
                del normalised
            grad = (grad_out[block] * wide_weight).unflatten(-1, groups)
            grad, _ = back(grad, gated, None, rstd, (True, False))
            assert grad is not None
            del gated
            grad = grad.flatten(-2)
            # In the place of what is no longer needed.
            grad_x = silu.mul_(grad).to(x.dtype)
            parts.append((grad_x, torch.ops.aten.silu_backward(grad.mul_(x[block]), wide_gate).to(gate.dtype)))
        grads = parts[0] if len(parts) == 1 else [torch.cat(each, -2) for each in zip(*parts, strict=True)]
        return *grads, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _blocks(x: Tensor) -> list[tuple[Any, ...]]:
    """Indices of blocks of x (..., seq, width), whose fp32 copies stay below `_TEMPORARY_BYTES`."""
    width = x.shape[:-2].numel() * x.shape[-1]
    return [(..., block, slice(None)) for block in row_blocks(x.shape[-2], width)]


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
