"""Mamba's short causal convolution with SiLU, over one tile, in the layout that the projection writes.

The plain path transposes to (batch, channels, seq), pads, convolves and applies SiLU: under autograd it keeps the
input, the convolution's output and its SiLU, and each transposition is a copy: about 8 bytes a channel and token in
bf16. With d_conv = 4 taps the convolution is four shifted products, which need no transposition. Kept for backward:
the input (a view into the projection's output, which other views keep alive anyway) and the previous tile's last
d_conv - 1 rows. fp32 temporaries are bounded by blocks of rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.norms import row_blocks


def causal_conv_silu(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu(conv(x) + bias)` for a depthwise causal convolution that continues after `tail`.

    Mirrors `causal_conv1d_fn` of transformers' Granite hybrid with `activation="silu"`, computed in fp32 and rounded
    once.

    Args:
        x: (batch, seq, channels), may be a view. The result has its shape and dtype, and is contiguous.
        tail: (batch, taps - 1, channels): the inputs before x; zeros at the start of a sequence.
        weight: (channels, taps).
        bias: (channels,) or None.
    """
    return _CausalConvSiLU.apply(x, tail, weight, bias)  # type: ignore[no-any-return]


def next_tail(x: Tensor, tail: Tensor) -> Tensor:
    """The last `tail.shape[1]` rows of `tail` followed by x: what the next tile continues after. A copy, so that it
    does not keep the projection's output alive."""
    rows = tail.shape[1]
    if x.shape[1] >= rows:
        return x[:, x.shape[1] - rows :].clone()
    return torch.cat([tail[:, x.shape[1] :], x], 1)


def _window(x: Tensor, tail: Tensor, block: slice) -> Tensor:
    """The block's rows of x after the taps - 1 rows before it; those before 0 come from the tail."""
    first = block.start - tail.shape[1]
    if first >= 0:
        return x[:, first : block.stop]
    return torch.cat([tail[:, block.start :], x[:, : block.stop]], 1)


def _preactivation(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution in fp32, weight (channels, taps) in fp32; each product casts its rows as it reads them."""
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    last = window[:, taps - 1 :], weight[:, taps - 1]
    out = torch.mul(*last) if bias is None else torch.addcmul(bias, *last)
    for tap in range(taps - 1):
        out.addcmul_(window[:, tap : tap + length], weight[:, tap])
    return out


class _CausalConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, seq, channels = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        taps = weight.float()
        for block in row_blocks(seq, batch * channels):
            pre = _preactivation(_window(x, tail, block), taps, bias)
            out[:, block] = F.silu(pre, inplace=True)
        ctx.save_for_backward(x, tail, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        x, tail, weight, bias = ctx.saved_tensors
        batch, seq, channels = x.shape
        taps, rows = weight.float(), tail.shape[1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(taps) if ctx.needs_input_grad[2] else None
        grad_bias = taps.new_zeros(channels) if bias is not None and ctx.needs_input_grad[3] else None
        # A block's rows also feed the block after it: what reaches back by `rows` is carried to the block before,
        # and from the first block into the tail. So the blocks are walked from the last.
        reaching_back: Tensor | None = None
        for block in reversed(row_blocks(seq, batch * channels)):
            length = block.stop - block.start
            window = _window(x, tail, block)
            grad = torch.ops.aten.silu_backward(grad_out[:, block], _preactivation(window, taps, bias))
            if grad_weight is not None:
                for tap in range(rows + 1):
                    grad_weight[:, tap] += (grad * window[:, tap : tap + length]).sum((0, 1))
            if grad_bias is not None:
                grad_bias += grad.sum((0, 1))
            wide = grad.new_zeros(batch, rows + length, channels)
            for tap in range(rows + 1):
                wide[:, tap : tap + length].addcmul_(grad, taps[:, tap])
            if reaching_back is not None:
                wide[:, length:] += reaching_back
            grad_x[:, block] = wide[:, rows:]
            reaching_back = wide[:, :rows].clone() if block.start else wide[:, :rows]
        assert reaching_back is not None
        return (
            grad_x,
            reaching_back.to(tail.dtype, copy=True) if ctx.needs_input_grad[1] else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
