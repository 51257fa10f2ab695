"""The Mamba-2 scan that keeps only its inputs.

For one layer of Granite-4.0-H-1B (48 heads of 64, state 128, one group) and 1,024 tokens, the plain PyTorch scan keeps
427 MiB for backward: the decays L, the scores G and their product M, each (chunk x chunk x heads) in fp32, 48 MiB, a
copy of B and of C for each of the 48 heads in fp32, 24 MiB each, and fp32 copies of x. The inputs themselves are
x 6 MiB, B and C 0.25 MiB each, dt 0.1 MiB in bf16. So:

- forward keeps the inputs and the initial state (1.5 MiB in fp32), nothing else;
- all chunks of a tile are computed together, each operator over all of them: 30 launches whatever the tile's length,
  and one a chunk for the recurrence of states. What bounds the working set is the tile. Beyond a bound, a
  temporary (a batch of many samples) it is walked in blocks of chunks; backward then walks forward for the state at
  each block's start, and recomputes one block at a time in reverse;
- B and C belong to a group of heads and are never repeated: what a state contributes to the output is one product
  (chunk, state) x (state, heads * head_dim) for the whole group;
- an operator computes in the widest of its operands' dtypes and rounds as it writes, so that no fp32 copy of a 16-bit
  factor exists, nor a 16-bit copy of an fp32 one beside it;
- a gradient is computed only where one is asked for: A, D and dt's bias are frozen in QLoRA.

The chunk's length is free: the result does not depend on it. Work inside a chunk grows with it (chunk x heads
exponentials a token), work on states falls with it (heads x head_dim x state / chunk numbers a token). At 64 the two
are about even, where the checkpoint's own 256 costs four times the exponentials: for 512 tokens the decays are
8 x 48 x 64 x 64 x 4 = 6 MiB, and the states 8 x 1.5 MiB.

Shapes are noted as `scan_chunks.py` says.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.scan_chunks import Chunks, ScanInputs, ScanOptions, blocks, chunks_of, product_dtype


def mamba2_scan(inputs: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """`y_t = C_t h_t + D x_t` with `h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t` and `dt = clamp(softplus(dt + bias))`.

    The chunked form of Dao and Gu, "Transformers are SSMs", 2024, section 6 and listing 1. Mirrors `mamba2_chunk_scan`
    of transformers' Granite hybrid. Products run in fp32, under autocast in autocast's dtype, as theirs do; decays and
    states are fp32 always.

    Returns:
        y (batch, seq, heads, head_dim) in fp32 (what the gated norm after it computes in), and the last state.
    """
    return _Scan.apply(*inputs, options)  # type: ignore[no-any-return]


def advance_state(inputs: ScanInputs, options: ScanOptions) -> Tensor:
    """The last state alone, without the output: about a third of the scan's work. C and D are not read."""
    dtype, state, inputs = product_dtype(inputs.x), inputs.state, inputs._replace(c=inputs.b)
    with torch.no_grad(), torch.autocast(inputs.x.device.type, enabled=False):
        for block in blocks(inputs, options):
            state = chunks_of(dtype, block, inputs, options).last_state(state)
    return state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, options = ScanInputs(*arguments[:-1]), arguments[-1]
        x, state = inputs.x, inputs.state
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.dtype = product_dtype(x)
        ctx.set_materialize_grads(False)
        parts = []
        with torch.autocast(x.device.type, enabled=False):
            for block in blocks(inputs, options):
                chunks = chunks_of(ctx.dtype, block, inputs, options)
                y, state = _output(chunks, state, inputs.d)
                parts.append(block.unfold(y))
        return _joined(parts), state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, options = ScanInputs(*ctx.saved_tensors), ctx.options
        x, _, a, b, _, d, dt_bias, state = inputs
        wanted = ctx.needs_input_grad
        states = []
        walk = blocks(inputs, options)
        parts: list[tuple[Tensor, ...]] = []
        with torch.autocast(x.device.type, enabled=False):
            for block in walk:
                states.append(state)
                if block is not walk[-1]:
                    state = chunks_of(ctx.dtype, block, inputs._replace(c=b), options).last_state(state)
            grad_a, grad_d, grad_bias = (torch.zeros_like(t, dtype=torch.float32) for t in (a, d, dt_bias))
            if grad_state is None:
                grad_state = torch.zeros_like(states[0])
            if grad_y is None:
                grad_y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for block in reversed(walk):
                chunks = chunks_of(ctx.dtype, block, inputs, options)
                grad = block.fold(grad_y)
                if wanted[5]:
                    grad_d += (grad * chunks.x).sum((0, 1, 3))
                grad_x, grad_dt, grad_decays, grad_b, grad_c, grad_state = _backward(
                    chunks, states.pop(), d, grad, grad_state, x.dtype
                )
                grad_raw = grad_dt.addcmul_(grad_decays, a).mul_(torch.sigmoid(chunks.raw))
                low, high = options.time_step_limit
                if low > 0 or high != float("inf"):
                    soft = F.softplus(chunks.raw)
                    grad_raw.mul_((soft >= low) & (soft <= high))
                if wanted[2]:
                    grad_a += (grad_decays * chunks.dt).sum((0, 1))
                if wanted[6]:
                    grad_bias += block.unfold(grad_raw).sum((0, 1))
                found = (grad_x, grad_raw, grad_b, grad_c)
                likes = (x, inputs.dt, b, inputs.c)
                parts.append(tuple(block.unfold(t).to(like.dtype) for t, like in zip(found, likes, strict=True)))
        grads = [_joined(each) for each in zip(*reversed(parts), strict=True)]
        return (
            grads[0],
            grads[1],
            grad_a.to(a.dtype) if wanted[2] else None,
            grads[2],
            grads[3],
            grad_d.to(d.dtype) if wanted[5] else None,
            grad_bias.to(dt_bias.dtype) if wanted[6] else None,
            grad_state if wanted[7] else None,
            None,
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _output(chunks: Chunks, state: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """y (b, l, h, p) fp32 = decay * (C h0) + M (dt x) + D x, with M = (C Bᵀ) * decay, and the state after the last."""
    starts, state = chunks.rounded_states(state)
    from_state = chunks.c @ starts.transpose(-1, -2)
    del starts
    y = chunks.by_head(from_state) * chunks.decay_from_start()[..., None]
    del from_state
    mixing = chunks.mixing(chunks.decay_matrix(), chunks.scores())
    y.transpose(1, 2).add_(mixing @ chunks.weighted())
    return y.addcmul_(chunks.x, d.float()[:, None]), state


def _backward(
    chunks: Chunks, state: Tensor, d: Tensor, grad: Tensor, grad_state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one block, from those of its output (b m, l, h, p) and of its last state (b, h, p, n), both fp32.

    Returns those of x in dtype, dt (as it scales x), A dt (b m, l, h), B, C (b m, l, g, n) and the block's first state.
    """
    grad_weighted, between, grad_b, grad_c = _within_chunks(chunks, grad)

    # From a chunk's first state: Y += decay_from_start * (C h0).
    to_end = chunks.decay_to_end()
    ending = chunks.ending(to_end)
    states = chunks.states(state, ending)
    starts, from_start = chunks.state_by_group(states), chunks.decay_from_start()
    reached = chunks.by_head(chunks.c @ starts.transpose(-1, -2))
    early = (grad * reached).sum(-1).mul_(from_start)  # a token's exponent is the sum of A dt up to it
    del reached
    scaled = chunks.by_group(torch.mul(grad, from_start[..., None], out=chunks.like_x()))
    grad_c = _plus_product(grad_c, scaled, starts)
    del starts
    grad_starts = (scaled.transpose(-1, -2) @ chunks.c).view(states.shape)
    del scaled

    # Into a chunk's last state: h1 = decay_over_chunk * h0 + (decay_to_end dt x)ᵀ B. It is the next chunk's first one.
    ends, grad_state = _gradients_of_ends(grad_starts, chunks, grad_state)
    del grad_starts
    grad_last = states.mul_(ends).sum((-1, -2)) * chunks.decay_over_chunk[..., 0, 0]
    end = chunks.state_by_group(ends)
    del states, ends
    grad_b = _plus_product(grad_b, chunks.by_group(ending), end)
    del ending
    through = chunks.by_head(chunks.b @ end.transpose(-1, -2)) * to_end[..., None]
    del end
    late = (through * chunks.x).sum(-1).mul_(chunks.dt)  # a token's exponent is the sum of A dt over those after it
    grad_weighted = through.add_(grad_weighted)

    # Each A dt is in the exponents of the tokens up to which, after which and across which they sum.
    grad_decays = early.flip(1).cumsum(1).flip(1).add_(grad_last[:, None])
    grad_decays[:, 1:] += late.cumsum(1).add_(between)[:, :-1]
    grad_dt = (grad_weighted * chunks.x).sum(-1)
    by_d = grad * d.float()[:, None]
    grad_x = torch.addcmul(by_d, grad_weighted, chunks.dt[..., None], out=torch.empty_like(by_d, dtype=dtype))
    return grad_x, grad_dt, grad_decays, grad_b.transpose(1, 2), grad_c.transpose(1, 2), grad_state


def _within_chunks(chunks: Chunks, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through Y = M (dt x), M = scores * decay: gradients of dt x (b, l, h, p), of the A dt after each token
    (b, l, h), of B and of C (b, g, l, n)."""
    dtype, by_group = chunks.x.dtype, (chunks.groups, -1)  # (b, h, l, l) as (b, g, h/g, l, l)
    grad_heads = grad.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)  # (b, h, l, p)
    decay, scores = chunks.decay_matrix(), chunks.scores()
    grad_mixing = (grad_heads @ chunks.weighted().transpose(-1, -2)) * decay
    mixing = chunks.mixing(decay, scores)
    del decay
    grad_weighted = (mixing.transpose(-1, -2) @ grad_heads).transpose(1, 2)
    del mixing, grad_heads
    grad_scores = grad_mixing.unflatten(1, by_group).sum(2).to(dtype)
    # dM * M, the gradient of an exponent, which is the sum of A dt over (j, i]. The A dt after k is in those with
    # j <= k < i. Summed so, and not as what ends less what starts at each token, since those two cancel: on the
    # diagonal wholly, which with strong decay is the largest.
    grad_mixing.unflatten(1, by_group).mul_(scores)
    between = grad_mixing.tril_(-1).cumsum_(-1).tril_(-1).sum(-2).transpose(1, 2)
    return grad_weighted, between, grad_scores.transpose(-1, -2) @ chunks.c, grad_scores @ chunks.b


def _plus_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, (b, g, l, n) each."""
    three = (t.flatten(0, 1) for t in (total, left, right))
    return torch.baddbmm(*three).view(total.shape)


def _gradients_of_ends(grad_starts: Tensor, chunks: Chunks, grad_state: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each chunk's last state (b m, h, p, n) in fp32, and of the block's first one."""
    kept, count = chunks.kept, chunks.count
    starts = grad_starts.unflatten(0, (-1, count))
    ends = torch.empty_like(starts, dtype=torch.float32)
    ends[:, -1] = grad_state
    # A chunk's last state is the next chunk's first one.
    for index in range(count - 1, 0, -1):
        torch.addcmul(starts[:, index], ends[:, index], kept[:, index], out=ends[:, index - 1])
    return ends.flatten(0, 1), torch.addcmul(starts[:, 0], ends[:, 0], kept[:, 0])
