"""The Mamba-2 scan that keeps only its inputs.

For one layer of Granite-4.0-H-1B (48 heads of 64, state 128, one group) and 1,024 tokens, the plain PyTorch scan keeps
427 MiB for backward: the decays L, the scores G and their product M, each (chunk x chunk x heads) in fp32, 48 MiB, a
copy of B and of C for each of the 48 heads in fp32, 24 MiB each, and fp32 copies of x. The inputs themselves are
x 6 MiB, B and C 0.25 MiB each, dt 0.1 MiB in bf16. So:

- forward walks blocks of a few chunks and keeps the inputs and the initial state (1.5 MiB in fp32), nothing else;
- backward walks forward for the state at each block's start, then in reverse, and recomputes one block at a time: the
  working set is four (chunks x chunk x chunk x heads) fp32 tensors;
- B and C belong to a group of heads and are never repeated: what a state contributes to the output is one product
  (chunk, state) x (state, heads * head_dim) for the whole group;
- a gradient is computed only where one is asked for: A, D and dt's bias are frozen in QLoRA.

The chunk's length is free: the result does not depend on it. Work inside a chunk grows with it (chunk x heads
exponentials a token), work on states falls with it (heads x head_dim x state / chunk numbers a token). At 64 the two
are about even, where the checkpoint's own 256 costs four times the exponentials. Four chunks go together, so that a GPU
gets a quarter of the launches: 4 x 48 x 64 x 64 x 4 = 3 MiB a temporary, and 4 x 1.5 MiB of states.

Notation of shapes: b batch, m chunks of a block, l length of a chunk, g groups, h heads, p head_dim, n state. A block
of chunks is folded into the batch: (b, m l, ...) becomes (b m, l, ...).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.tiles import spans

CHUNKS_TOGETHER = 4


@dataclass(frozen=True)
class ScanOptions:
    """What a scan needs besides tensors. `time_step_limit` clamps dt after its softplus."""

    chunk_length: int = 64
    time_step_limit: tuple[float, float] = (0.0, float("inf"))


class ScanInputs(NamedTuple):
    """What a scan reads; x, b and c may be views."""

    x: Tensor  # (batch, seq, heads, head_dim)
    dt: Tensor  # (batch, seq, heads), before bias and softplus
    a: Tensor  # (heads,), negative, fp32
    b: Tensor  # (batch, seq, groups, state)
    c: Tensor  # as b
    d: Tensor  # (heads,)
    dt_bias: Tensor  # (heads,)
    state: Tensor  # (batch, heads, head_dim, state), fp32: the state before the first token


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
        for block in blocks(inputs.x.shape[1], options.chunk_length):
            state = chunks_of(dtype, block, inputs, options).states(state)[1]
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
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for block in blocks(x.shape[1], options.chunk_length):
                chunks = chunks_of(ctx.dtype, block, inputs, options)
                starts, state = chunks.states(state)
                y[:, block[0]] = _output(chunks, starts, inputs.d).reshape(x.shape[0], -1, *x.shape[2:])
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, options = ScanInputs(*ctx.saved_tensors), ctx.options
        x, dt, a, b, c, d, dt_bias, state = inputs
        wanted = ctx.needs_input_grad
        states = []
        walk = list(blocks(x.shape[1], options.chunk_length))
        with torch.autocast(x.device.type, enabled=False):
            for block in walk:
                states.append(state)
                if block is not walk[-1]:
                    state = chunks_of(ctx.dtype, block, inputs._replace(c=b), options).states(state)[1]
            grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)]
            grad_a, grad_d, grad_bias = (torch.zeros_like(t, dtype=torch.float32) for t in (a, d, dt_bias))
            if grad_state is None:
                grad_state = torch.zeros_like(states[0])
            if grad_y is None:
                grad_y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for block in reversed(walk):
                chunks = chunks_of(ctx.dtype, block, inputs, options)
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


def _output(chunks: "Chunks", states: Tensor, d: Tensor) -> Tensor:
    """y (b, l, h, p) fp32 = decay * (C h0) + M (dt x) + D x, with M = (C Bᵀ) * decay."""
    from_state = chunks.c @ chunks.state_by_group(states).transpose(-1, -2)
    y = chunks.by_head(from_state).float() * chunks.decay_from_start()[..., None]
    mixing = chunks.decay_matrix()
    mixing.unflatten(1, (chunks.groups, -1)).mul_(chunks.scores())  # (b, g, h/g, l, l)
    weighted = chunks.x * chunks.dt.to(chunks.x.dtype)[..., None]
    y += (mixing.to(chunks.x.dtype) @ weighted.transpose(1, 2)).transpose(1, 2)
    return y.addcmul_(chunks.x, d.to(chunks.x.dtype)[:, None])


def _backward(
    chunks: "Chunks", state: Tensor, d: Tensor, grad: Tensor, grad_state: Tensor
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
    by_group = (groups, -1)  # (b, h, l, l) as (b, g, h/g, l, l)
    grad_scores = grad_mixing.unflatten(1, by_group).sum(2).to(dtype)
    mixing.unflatten(1, by_group).mul_(scores)
    grad_weighted = (mixing.to(dtype).transpose(-1, -2) @ grad_heads).transpose(1, 2).float()
    del mixing, grad_heads
    # dM * M, the exponent's gradient: summed over j for its later end, over i for its earlier one. On the diagonal the
    # two cancel: left out, because with strong decay it is the largest, and its rounding would stay. The sums are
    # doubles (a few thousand numbers), because summed up over the tokens below they cancel again.
    grad_mixing.unflatten(1, by_group).mul_(scores)
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
    """Gradients of each chunk's last state (b m, h, p, n), and of the block's first one."""
    # A chunk's last state is the next chunk's first one, so a result takes the place of what it was made from.
    ends, kept = grad_starts.view(-1, count, *grad_starts.shape[1:]), kept.unflatten(0, (-1, count))
    for index in reversed(range(count)):
        grad_first = torch.addcmul(ends[:, index], grad_state, kept[:, index])
        ends[:, index] = grad_state
        grad_state = grad_first
    return grad_starts, grad_state


def blocks(seq: int, chunk_length: int) -> Iterator[tuple[slice, int]]:
    """Spans of the sequence with the number of equal chunks in each; the rest that fills no chunk comes last."""
    whole = seq - seq % chunk_length
    for span in spans(0, whole, CHUNKS_TOGETHER * chunk_length):
        yield span, (span.stop - span.start) // chunk_length
    if whole < seq:
        yield slice(whole, seq), 1


def _decay(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> Tensor:
    """exp(later - earlier) of two cumulative sums, each as (high, low) parts.

    Sums reach thousands (48 heads deep A = -48, dt about 1, 128 tokens), where an fp32 difference is off by 1e-4, which
    is then a relative error of the decay. High parts close to each other subtract exactly (Sterbenz), the low parts
    restore what rounding took; far apart, the decay is zero.
    """
    return (later[0] - earlier[0]).add_(later[1] - earlier[1]).exp_()


@dataclass
class Chunks:
    """A block of chunks, folded into the batch (b stands for b m here). x, b and c are in the products' dtype, the rest
    is fp32."""

    count: int  # m
    x: Tensor  # (b, l, h, p)
    b: Tensor  # (b, g, l, n)
    c: Tensor  # (b, g, l, n)
    raw: Tensor  # (b, l, h): dt with bias, before softplus
    dt: Tensor  # (b, l, h)
    cumulative: tuple[Tensor, Tensor]  # (b, h, l) twice: sum of A dt up to and with each token

    @property
    def groups(self) -> int:
        return self.b.shape[1]

    def decay_matrix(self) -> Tensor:
        """(b, h, l, l): exp of the sum of A dt over (j, i], zero above the diagonal."""
        high, low = self.cumulative
        return _decay((high[..., :, None], low[..., :, None]), (high[..., None, :], low[..., None, :])).tril_()

    def decay_from_start(self) -> Tensor:
        """(b, l, h)"""
        return self.cumulative[0].exp().transpose(1, 2)

    def decay_to_end(self) -> Tensor:
        """(b, l, h)"""
        high, low = self.cumulative
        return _decay((high[..., -1:], low[..., -1:]), (high, low)).transpose(1, 2)

    def decay_over_chunk(self) -> Tensor:
        """(b, h, 1, 1)"""
        return self.cumulative[0][..., -1].exp()[..., None, None]

    def by_group(self, t: Tensor) -> Tensor:
        """(b, l, h, p) as (b, g, l, h/g * p), the right side of a product with B or C."""
        batch, length = t.shape[:2]
        return t.reshape(batch, length, self.groups, -1).transpose(1, 2)

    def by_head(self, t: Tensor) -> Tensor:
        """(b, g, l, h/g * p) as (b, l, h, p): the inverse of `by_group`."""
        batch, _, length, _ = t.shape
        return t.transpose(1, 2).reshape(batch, length, -1, self.x.shape[-1])

    def state_by_group(self, state: Tensor) -> Tensor:
        """(b, h, p, n) as (b, g, h/g * p, n) in the products' dtype."""
        return state.to(self.x.dtype).reshape(state.shape[0], self.groups, -1, state.shape[-1])

    def scores(self) -> Tensor:
        """(b, g, 1, l, l) fp32: C Bᵀ."""
        return (self.c @ self.b.transpose(-1, -2)).float()[:, :, None]

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state at each chunk's start, (b m, h, p, n), and the one after the last, from the block's first."""
        weighted = self.by_group(self.x * (self.dt * self.decay_to_end()).to(self.x.dtype)[..., None])
        added = (weighted.transpose(-1, -2) @ self.b).float()  # (b m, g, h/g * p, n)
        added = added.view(-1, self.count, *state.shape[1:])
        kept = self.decay_over_chunk().unflatten(0, (-1, self.count))
        starts = torch.empty_like(added)
        for index in range(self.count):
            starts[:, index] = state
            state = torch.addcmul(added[:, index], state, kept[:, index])
        return starts.flatten(0, 1), state


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else fp32."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def chunks_of(dtype: torch.dtype, block: tuple[slice, int], inputs: ScanInputs, options: ScanOptions) -> Chunks:
    raw = fold(inputs.dt, block).float() + inputs.dt_bias
    step = F.softplus(raw).clamp_(*options.time_step_limit)
    exact = (step * inputs.a).transpose(1, 2).double().cumsum(-1)  # a few thousand numbers: doubles cost nothing here
    high = exact.float()
    low = exact.sub_(high).float()
    return Chunks(
        block[1],
        fold(inputs.x, block).to(dtype),
        fold(inputs.b, block).transpose(1, 2).to(dtype),
        fold(inputs.c, block).transpose(1, 2).to(dtype),
        raw,
        step,
        (high, low),
    )


def fold(t: Tensor, block: tuple[slice, int]) -> Tensor:
    """(b, seq, ...) to the block's chunks (b m, l, ...)."""
    span, count = block
    return t[:, span].unflatten(1, (count, -1)).flatten(0, 1)  # type: ignore[no-any-return]
