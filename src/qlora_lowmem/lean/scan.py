"""The Mamba-2 scan that keeps only its inputs.

For one layer of Granite-4.0-H-1B (48 heads of 64, state 128, one group) and 1,024 tokens, the plain PyTorch scan keeps
427 MiB for backward: the decays L, the scores G and their product M, each (chunk x chunk x heads) in fp32, 48 MiB, a
copy of B and of C for each of the 48 heads in fp32, 24 MiB each, and fp32 copies of x. The inputs themselves are
x 6 MiB, B and C 0.25 MiB each, dt 0.1 MiB in bf16. So:

- forward keeps the inputs and the initial state (1.5 MiB in fp32), nothing else;
- all chunks of a tile are computed together, each operator over all of them: 30 launches whatever the tile's length,
  and one a chunk for the recurrence of states. What bounds the working set is the tile. Beyond `_TEMPORARY_BYTES` a
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

Notation of shapes: b batch, m chunks of a block, l length of a chunk, g groups, h heads, p head_dim, n state. A block
of chunks is folded into the batch: (b, m l, ...) becomes (b m, l, ...), its last chunk filled up with zeros.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.tiles import spans

# One fp32 temporary of a block, decays or states: 64 MiB is 5,461 tokens of Granite-4.0-H-1B in one sample. Backward
# holds about six.
_TEMPORARY_BYTES = 64 * 2**20


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


def _output(chunks: "Chunks", state: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
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
    chunks: "Chunks", state: Tensor, d: Tensor, grad: Tensor, grad_state: Tensor, dtype: torch.dtype
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


def _within_chunks(chunks: "Chunks", grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _gradients_of_ends(grad_starts: Tensor, chunks: "Chunks", grad_state: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of each chunk's last state (b m, h, p, n) in fp32, and of the block's first one."""
    kept, count = chunks.kept, chunks.count
    starts = grad_starts.unflatten(0, (-1, count))
    ends = torch.empty_like(starts, dtype=torch.float32)
    ends[:, -1] = grad_state
    # A chunk's last state is the next chunk's first one.
    for index in range(count - 1, 0, -1):
        torch.addcmul(starts[:, index], ends[:, index], kept[:, index], out=ends[:, index - 1])
    return ends.flatten(0, 1), torch.addcmul(starts[:, 0], ends[:, 0], kept[:, 0])


@dataclass(frozen=True)
class Block:
    """Some chunks of a sequence, computed together. The last one may lack tokens, which are zeros then."""

    span: slice
    count: int
    length: int  # of a chunk

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return int(self.span.stop - self.span.start)

    @property
    def missing(self) -> int:
        """Tokens that the last chunk lacks."""
        return self.count * self.length - self.tokens

    def fold(self, t: Tensor) -> Tensor:
        """(b, seq, ...) to the block's chunks (b m, l, ...)."""
        part = t[:, self.span]
        if self.missing:
            part = F.pad(part, [0, 0] * (t.dim() - 2) + [0, self.missing])
        return part.unflatten(1, (self.count, self.length)).flatten(0, 1)  # type: ignore[no-any-return]

    def unfold(self, t: Tensor) -> Tensor:
        """(b m, l, ...) to the block's tokens (b, tokens, ...)."""
        whole: Tensor = t.unflatten(0, (-1, self.count)).flatten(1, 2)
        return whole[:, : self.tokens] if self.missing else whole


def blocks(inputs: ScanInputs, options: ScanOptions) -> list[Block]:
    """Blocks of a sequence, of as many chunks as `_TEMPORARY_BYTES` allow, at least one."""
    batch, seq, heads, dim = inputs.x.shape
    length = min(options.chunk_length, seq)
    a_chunk = 4 * batch * heads * max(length * length, dim * inputs.state.shape[-1])
    step = max(_TEMPORARY_BYTES // a_chunk, 1) * length
    return [Block(span, math.ceil((span.stop - span.start) / length), length) for span in spans(0, seq, step)]


@dataclass
class Chunks:
    """A block of chunks, folded into the batch (b stands for b m here). x, b and c are in the products' dtype, `raw`
    and dt in fp32."""

    count: int  # m
    x: Tensor  # (b, l, h, p)
    b: Tensor  # (b, g, l, n)
    c: Tensor  # (b, g, l, n)
    raw: Tensor  # (b, l, h): dt with bias, before softplus
    dt: Tensor  # (b, l, h)
    # (b, l, h), the sum of A dt up to and with each token. Sums reach thousands (48 heads deep A = -48, dt about 1, 128
    # tokens), where a difference in fp32 is off by 1e-4, which is then a relative error of the decay: these are doubles
    # (a few thousand numbers), and what is made of them is rounded as it is written.
    cumulative: Tensor

    @property
    def groups(self) -> int:
        return self.b.shape[1]

    def like_x(self) -> Tensor:
        """An empty (b, l, h, p) in the products' dtype, without gaps."""
        return torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)

    def decay_matrix(self) -> Tensor:
        """(b, h, l, l) fp32: exp of the sum of A dt over (j, i], zero above the diagonal."""
        sums = self.cumulative.transpose(1, 2)
        shape = (*sums.shape, sums.shape[-1])
        decay = torch.empty(shape, dtype=torch.float32, device=sums.device)
        return torch.sub(sums[..., :, None], sums[..., None, :], out=decay).exp_().tril_()

    def mixing(self, decay: Tensor, scores: Tensor) -> Tensor:
        """(b, h, l, l) in the products' dtype: the decays times the scores."""
        by_group = (self.groups, -1)
        out = torch.empty(decay.shape, dtype=self.x.dtype, device=decay.device)
        torch.mul(decay.unflatten(1, by_group), scores, out=out.unflatten(1, by_group))
        return out

    def weighted(self) -> Tensor:
        """(b, h, l, p) in the products' dtype: dt x."""
        x = self.x.transpose(1, 2)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return torch.mul(x, self.dt.transpose(1, 2)[..., None], out=out)

    def decay_from_start(self) -> Tensor:
        """(b, l, h) fp32"""
        return torch.exp(self.cumulative, out=torch.empty_like(self.raw))

    def decay_to_end(self) -> Tensor:
        """(b, l, h) fp32"""
        sums = self.cumulative
        return torch.sub(sums[:, -1:], sums, out=torch.empty_like(self.raw)).exp_()

    @functools.cached_property
    def decay_over_chunk(self) -> Tensor:
        """(b, h, 1, 1) fp32"""
        sums = self.cumulative[:, -1]
        return torch.exp(sums, out=torch.empty_like(sums, dtype=torch.float32))[..., None, None]

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
        """(b, g, 1, l, l): C Bᵀ."""
        return (self.c @ self.b.transpose(-1, -2))[:, :, None]

    def ending(self, to_end: Tensor) -> Tensor:
        """(b, l, h, p) in the products' dtype: dt x as it arrives at its chunk's end."""
        return torch.mul(self.x, (self.dt * to_end)[..., None], out=self.like_x())

    def added(self, ending: Tensor) -> Tensor:
        """(b, m, h, p, n) in the products' dtype: what each chunk adds to the state, from `ending`; b unfolded."""
        added = self.by_group(ending).transpose(-1, -2) @ self.b  # (b m, g, h/g * p, n)
        return added.view(-1, self.count, self.x.shape[2], self.x.shape[3], self.b.shape[-1])

    def last_state(self, state: Tensor) -> Tensor:
        """The state after the last chunk, from the block's first, (b, h, p, n) fp32."""
        added, kept = self.added(self.ending(self.decay_to_end())), self.kept
        for index in range(self.count):
            state = torch.addcmul(added[:, index], state, kept[:, index])
        return state

    def rounded_states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state at each chunk's start as products take it, (b, g, h/g * p, n), and the one after the last, fp32."""
        starts, kept = self.added(self.ending(self.decay_to_end())), self.kept
        for index in range(self.count):
            after = torch.addcmul(starts[:, index], state, kept[:, index])
            starts[:, index] = state  # in the place of what was added
            state = after
        return self.state_by_group(starts.flatten(0, 1)), state

    def states(self, state: Tensor, ending: Tensor) -> Tensor:
        """The state at each chunk's start in fp32, (b m, h, p, n)."""
        added, kept = self.added(ending), self.kept
        starts = torch.empty_like(added, dtype=torch.float32)
        starts[:, 0] = state
        for index in range(self.count - 1):
            torch.addcmul(added[:, index], starts[:, index], kept[:, index], out=starts[:, index + 1])
        return starts.flatten(0, 1)

    @property
    def kept(self) -> Tensor:
        """(b, m, h, 1, 1) fp32: `decay_over_chunk`, b unfolded."""
        return self.decay_over_chunk.unflatten(0, (-1, self.count))  # type: ignore[no-any-return]


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else fp32."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def chunks_of(dtype: torch.dtype, block: Block, inputs: ScanInputs, options: ScanOptions) -> Chunks:
    """A block's chunks. A token that is filled in has x = 0 and dt = 0, and so changes no state."""
    dt, low, high = block.fold(inputs.dt), *options.time_step_limit
    raw = torch.add(dt, inputs.dt_bias.float(), out=torch.empty(dt.shape, dtype=torch.float32, device=dt.device))
    step = F.softplus(raw)
    if low > 0 or high != float("inf"):
        step.clamp_(low, high)
    if block.missing:
        step.unflatten(0, (-1, block.count))[:, -1, block.length - block.missing :] = 0
    sums = torch.mul(step, inputs.a, out=torch.empty_like(step, dtype=torch.float64)).cumsum_(1)
    return Chunks(
        block.count,
        block.fold(inputs.x).to(dtype),
        block.fold(inputs.b).transpose(1, 2).to(dtype),
        block.fold(inputs.c).transpose(1, 2).to(dtype),
        raw,
        step,
        sums,
    )
