"""SwiGLU that keeps only the projections it is given.

`silu(gate) * up` under autograd keeps gate, up and silu(gate): per token and intermediate width m, 6 m bytes in bf16.
gate and up (4 m bytes) are all that the backward needs: it recomputes silu(gate). Where they are two halves of one
projection, their gradients are written into one tensor, so no concatenation follows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` with `gate, up = gate_up.chunk(2, -1)` (Shazeer, "GLU Variants Improve Transformer", 2020).

    (..., 2 m) to (..., m) in the same dtype. The arithmetic is PyTorch's own in that dtype: bit by bit the plain one.
    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(grad_out, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_out * up, gate))
        return grad


def swiglu_of(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of two projections, (..., m) each; otherwise as `swiglu`."""
    return _SwiGLUOfTwo.apply(gate, up)  # type: ignore[no-any-return]


class _SwiGLUOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_out * up, gate), F.silu(gate).mul_(grad_out)
