"""The Mamba-2 scan that keeps only its inputs.

For one layer of Granite-4.0-H-1B (48 heads of 64, state 128, one group) and 1,024 tokens, the plain PyTorch scan keeps
427 MiB for backward: the decays L, the scores G and their product M, each (chunk x chunk x heads) in fp32, 48 MiB, a
copy of B and of C for each of the 48 heads in fp32, 24 MiB each, and fp32 copies of x. The inputs themselves are
x 6 MiB, B and C 0.25 MiB each, dt 0.1 MiB in bf16. So:

- forward walks blocks of a few chunks in order and keeps the inputs and the initial state (1.5 MiB in fp32), nothing
  else;
- backward walks once forward for the state at each block's start, then walks in reverse and recomputes one block at a
  time: the working set is four (chunks x chunk x chunk x heads) fp32 tensors;
- B and C belong to a group of heads, so they are never repeated: what a state contributes to the output is one product
  (chunk, state) x (state, heads * head_dim) for the whole group;
- a gradient is computed only where one is asked for: A, D and dt's bias are frozen in QLoRA.

The chunk's length is free: the result does not depend on it. Work inside a chunk grows with it (chunk x heads
exponentials a token), work on states falls with it (heads x head_dim x state / chunk numbers a token). At 64 the two
are about even, where the checkpoint's own 256 costs four times the exponentials. Four chunks go together, so that a GPU
gets a quarter of the launches: 4 x 48 x 64 x 64 x 4 = 3 MiB a temporary, and 4 x 1.5 MiB of states.

`scan_chunks.py` has the notation of the shapes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.scan_chunks import Chunks, ScanOptions, blocks, chunks_of, fold, product_dtype


def mamba2_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    """`y_t = C_t h_t + D x_t` with `h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t` and `dt = clamp(softplus(dt + bias))`.

    The chunked form of Dao and Gu, "Transformers are SSMs", 2024, section 6 and listing 1. Mirrors `mamba2_chunk_scan`
    of transformers' Granite hybrid. Products run in fp32, under autocast in autocast's dtype, as theirs do; decays and
    states are fp32 always.

    Args:
        x: (batch, seq, heads, head_dim), may be a view.
        dt: (batch, seq, heads), before bias and softplus.
        a: (heads,), negative, fp32.
        b: (batch, seq, groups, state), may be a view.
        c: (batch, seq, groups, state), may be a view.
        d: (heads,).
        dt_bias: (heads,).
        state: (batch, heads, head_dim, state), fp32: the state before the first token.
        options: chunk length and limits.

    Returns:
        y (batch, seq, heads, head_dim) in fp32 (what the gated norm after it computes in), and the last state.
    """
    return _Scan.apply(x, dt, a, b, c, d, dt_bias, state, options)  # type: ignore[no-any-return]


def advance_state(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, state: Tensor, options: ScanOptions
) -> Tensor:
    """The last state alone, without the output: about a third of the scan's work. Shapes as in `mamba2_scan`."""
    dtype = product_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for block in blocks(x.shape[1], options.chunk_length):
            state = chunks_of(dtype, block, x, dt, a, b, b, dt_bias, options).states(state)[1]
    return state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        options: ScanOptions,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, a, b, c, d, dt_bias, state)
        ctx.options = options
        ctx.dtype = product_dtype(x)
        ctx.set_materialize_grads(False)
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for block in blocks(x.shape[1], options.chunk_length):
                chunks = chunks_of(ctx.dtype, block, x, dt, a, b, c, dt_bias, options)
                starts, state = chunks.states(state)
                y[:, block[0]] = _output(chunks, starts, d).reshape(x.shape[0], -1, *x.shape[2:])
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, d, dt_bias, state = ctx.saved_tensors
        options = ctx.options
        wanted = ctx.needs_input_grad
        states = []
        walk = list(blocks(x.shape[1], options.chunk_length))
        with torch.autocast(x.device.type, enabled=False):
            for block in walk:
                states.append(state)
                if block is not walk[-1]:
                    state = chunks_of(ctx.dtype, block, x, dt, a, b, b, dt_bias, options).states(state)[1]
            grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)]
            grad_a, grad_d, grad_bias = (torch.zeros_like(t, dtype=torch.float32) for t in (a, d, dt_bias))
            if grad_state is None:
                grad_state = torch.zeros_like(states[0])
            if grad_y is None:
                grad_y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for block in reversed(walk):
                chunks = chunks_of(ctx.dtype, block, x, dt, a, b, c, dt_bias, options)
                grad = fold(grad_y, block)
                if wanted[5]:
                    grad_d += (grad * chunks.x).sum((0, 1, 3))
                grad_x, grad_dt, grad_decays, grad_b, grad_c, grad_state = _backward(
                    chunks, states.pop(), d, grad, grad_state
                )
                grad_dt += grad_decays * a
                grad_raw = grad_dt.mul_(torch.sigmoid(chunks.raw))
                low, high = options.time_step_limit
                if low > 0 or high != float("inf"):
                    soft = F.softplus(chunks.raw)
                    grad_raw.mul_((soft >= low) & (soft <= high))
                if wanted[2]:
                    grad_a += (grad_decays * chunks.dt).sum((0, 1))
                if wanted[6]:
                    grad_bias += grad_raw.sum((0, 1))
                for whole, part in zip(grads, (grad_x, grad_raw, grad_b, grad_c), strict=True):
                    whole[:, block[0]] = part.reshape(x.shape[0], -1, *whole.shape[2:])
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


def _heads_by_group(t: Tensor, groups: int) -> Tensor:
    """(b, h, l, l) as (b, g, h/g, l, l)."""
    grouped: Tensor = t.unflatten(1, (groups, -1))
    return grouped


def _output(chunks: Chunks, states: Tensor, d: Tensor) -> Tensor:
    """y (b, l, h, p) fp32 = decay * (C h0) + M (dt x) + D x, with M = (C Bᵀ) * decay."""
    from_state = chunks.c @ chunks.state_by_group(states).transpose(-1, -2)
    y = chunks.by_head(from_state).float() * chunks.decay_from_start()[..., None]
    mixing = chunks.decay_matrix()
    _heads_by_group(mixing, chunks.groups).mul_(chunks.scores())
    weighted = chunks.x * chunks.dt.to(chunks.x.dtype)[..., None]
    y += (mixing.to(chunks.x.dtype) @ weighted.transpose(1, 2)).transpose(1, 2)
    return y.addcmul_(chunks.x, d.to(chunks.x.dtype)[:, None])


def _backward(
    chunks: Chunks, state: Tensor, d: Tensor, grad: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one block, from those of its output (b m, l, h, p) and of its last state (b, h, p, n), both fp32.

    Returns those of x, dt (as it scales x), A dt (b m, l, h), B, C (b m, l, g, n) and the block's first state.
    """
    dtype, groups = chunks.x.dtype, chunks.groups
    x = chunks.x.float()
    weighted = x * chunks.dt[..., None]  # dt x
    grad_heads = grad.transpose(1, 2).to(dtype)  # (b, h, l, p)

    # Inside a chunk: Y = M (dt x), M = scores * decay.
    scores = chunks.scores()
    mixing = chunks.decay_matrix()
    grad_mixing = (grad_heads @ weighted.transpose(1, 2).to(dtype).transpose(-1, -2)).float().mul_(mixing)
    grad_scores = _heads_by_group(grad_mixing, groups).sum(2).to(dtype)
    _heads_by_group(mixing, groups).mul_(scores)
    grad_weighted = (mixing.to(dtype).transpose(-1, -2) @ grad_heads).transpose(1, 2).float()
    del mixing, grad_heads
    # dM * M, the exponent's gradient: summed over j for its later end, over i for its earlier one. On the diagonal the
    # two cancel: left out, because with strong decay it is the largest, and its rounding would stay. The sums are
    # doubles (a few thousand numbers), because summed up over the tokens below they cancel again.
    _heads_by_group(grad_mixing, groups).mul_(scores)
    grad_exponent = grad_mixing.tril_(-1)
    ends_here, starts_here = (grad_exponent.sum(axis, dtype=torch.float64) for axis in (-1, -2))
    grad_cumulative = (ends_here - starts_here).transpose(1, 2)  # (b, l, h)
    del grad_exponent, grad_mixing, scores
    grad_c = grad_scores @ chunks.b
    grad_b = grad_scores.transpose(-1, -2) @ chunks.c

    # From a chunk's first state: Y += decay_from_start * (C h0).
    states = chunks.states(state)[0]
    starts = chunks.state_by_group(states)
    scaled = grad * chunks.decay_from_start()[..., None]
    grad_cumulative += (scaled * chunks.by_head(chunks.c @ starts.transpose(-1, -2))).sum(-1)
    scaled = chunks.by_group(scaled.to(dtype))
    grad_c = grad_c + scaled @ starts
    grad_starts = (scaled.transpose(-1, -2) @ chunks.c).float().view(states.shape)
    del scaled, starts

    # Into a chunk's last state: h1 = decay_over_chunk * h0 + (decay_to_end dt x)ᵀ B. It is the next chunk's first one.
    kept = chunks.decay_over_chunk()
    ends, grad_state = _gradients_of_ends(grad_starts, kept, chunks.count, grad_state)
    grad_last = (ends * states).sum((-1, -2)) * kept[..., 0, 0]
    del states, grad_starts
    end = chunks.state_by_group(ends)
    to_end = chunks.decay_to_end()[..., None]
    grad_b = grad_b + chunks.by_group((weighted * to_end).to(dtype)) @ end
    through = chunks.by_head(chunks.b @ end.transpose(-1, -2)).float() * to_end
    grad_weighted += through
    grad_to_end = through.mul_(weighted).sum(-1)  # times its own decay: d exponent
    grad_to_end[:, -1] = 0  # the last token does not decay
    grad_cumulative -= grad_to_end
    grad_cumulative[:, -1] += grad_to_end.sum(1, dtype=torch.float64) + grad_last

    grad_decays = grad_cumulative.flip(1).cumsum(1).flip(1).float()
    grad_x = torch.addcmul(grad * d.float()[:, None], grad_weighted, chunks.dt[..., None])
    grad_dt = grad_weighted.mul_(x).sum(-1)
    return grad_x, grad_dt, grad_decays, grad_b.transpose(1, 2), grad_c.transpose(1, 2), grad_state


def _gradients_of_ends(grad_starts: Tensor, kept: Tensor, count: int, grad_state: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each chunk's last state (b m, h, p, n), and of the block's first one, from the output's gradient
    through each chunk's first state, which is overwritten, and from that of the block's last state."""
    # A chunk's last state is the next chunk's first one, so a result takes the place of what it was made from.
    ends, kept = grad_starts.view(-1, count, *grad_starts.shape[1:]), kept.unflatten(0, (-1, count))
    for index in reversed(range(count)):
        grad_first = torch.addcmul(ends[:, index], grad_state, kept[:, index])
        ends[:, index] = grad_state
        grad_state = grad_first
    return grad_starts, grad_state
