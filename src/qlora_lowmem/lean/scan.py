"""The Mamba-2 scan that keeps only its inputs.

For one layer of Granite-4.0-H-1B (48 heads of 64, state 128, one group) and 1,024 tokens, the plain PyTorch scan keeps
427 MiB for backward: the decays L, the scores G and their product M, each (chunk x chunk x heads) in fp32, 48 MiB, a
copy of B and of C for each of the 48 heads in fp32, 24 MiB each, and fp32 copies of x. The inputs themselves are
x 6 MiB, B and C 0.25 MiB each, dt 0.1 MiB in bf16. So:

- forward walks chunks in order and keeps the inputs and the initial state (1.5 MiB in fp32), nothing else;
- backward walks once forward for the state at each chunk's start (1.5 MiB a chunk), then walks in reverse and
  recomputes one chunk at a time: the working set is four (chunk x chunk x heads) fp32 tensors;
- B and C belong to a group of heads, so they are never repeated: what a state contributes to the output is one product
  (chunk, state) x (state, heads * head_dim) for the whole group;
- a gradient is computed only where one is asked for: A, D and dt's bias are frozen in QLoRA.

The chunk's length is free: the result does not depend on it. Work inside a chunk grows with it (chunk x heads
exponentials a token), work on states falls with it (heads x head_dim x state numbers a chunk). 128 costs
48 x 128 x 128 x 4 = 3 MiB a temporary, a quarter of what the checkpoint's 256 costs, at no more arithmetic.

Notation of the code: b batch, l length of the chunk, g groups, h heads, p head_dim, n state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ScanOptions:
    """What a scan needs besides tensors. `time_step_limit` clamps dt after its softplus."""

    chunk_length: int = 128
    time_step_limit: tuple[float, float] = (0.0, float("inf"))


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
    dtype = _product_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[1], options.chunk_length):
            span = slice(start, start + options.chunk_length)
            chunk = _chunk(dtype, span, x, dt, a, b, b, dt_bias, options)
            state = chunk.next_state(state)
    return state


def _decay(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> Tensor:
    """exp(later - earlier) of two cumulative sums, each as (high, low) parts.

    Sums reach thousands (48 heads deep A = -48, dt about 1, 128 tokens), where an fp32 difference is off by 1e-4, which
    is then a relative error of the decay. High parts close to each other subtract exactly (Sterbenz), the low parts
    restore what rounding took; far apart, the decay is zero.
    """
    return (later[0] - earlier[0]).add_(later[1] - earlier[1]).exp_()


@dataclass
class _Chunk:
    """One chunk in the dtypes that it is computed in. x, b, c in `x.dtype`, the rest fp32."""

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

    def next_state(self, state: Tensor) -> Tensor:
        weighted = self.by_group(self.x * (self.dt * self.decay_to_end()).to(self.x.dtype)[..., None])
        added = weighted.transpose(-1, -2) @ self.b  # (b, g, h/g * p, n)
        last = self.cumulative[0][..., -1].exp()[..., None, None]
        return torch.addcmul(added.float().view(state.shape), state, last)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else fp32."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def _chunk(
    dtype: torch.dtype,
    span: slice,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    options: ScanOptions,
) -> _Chunk:
    raw = dt[:, span].float() + dt_bias
    step = F.softplus(raw).clamp_(*options.time_step_limit)
    exact = (step * a).transpose(1, 2).double().cumsum(-1)  # a few thousand numbers: doubles cost nothing here
    high = exact.float()
    low = exact.sub_(high).float()
    return _Chunk(
        x[:, span].to(dtype),
        b[:, span].transpose(1, 2).to(dtype),
        c[:, span].transpose(1, 2).to(dtype),
        raw,
        step,
        (high, low),
    )


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
        ctx.dtype = _product_dtype(x)
        ctx.set_materialize_grads(False)
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[1], options.chunk_length):
                span = slice(start, start + options.chunk_length)
                chunk = _chunk(ctx.dtype, span, x, dt, a, b, c, dt_bias, options)
                y[:, span] = _output(chunk, state, d)
                state = chunk.next_state(state)
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, d, dt_bias, state = ctx.saved_tensors
        options = ctx.options
        wanted = ctx.needs_input_grad
        states = []
        spans = [slice(s, s + options.chunk_length) for s in range(0, x.shape[1], options.chunk_length)]
        with torch.autocast(x.device.type, enabled=False):
            for span in spans:
                states.append(state)
                if span is not spans[-1]:
                    state = _chunk(ctx.dtype, span, x, dt, a, b, b, dt_bias, options).next_state(state)
            grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)]
            grad_a, grad_d, grad_bias = (torch.zeros_like(t, dtype=torch.float32) for t in (a, d, dt_bias))
            if grad_state is None:
                grad_state = torch.zeros_like(states[0])
            for span in reversed(spans):
                chunk = _chunk(ctx.dtype, span, x, dt, a, b, c, dt_bias, options)
                grad = grad_y[:, span] if grad_y is not None else torch.zeros_like(chunk.x, dtype=torch.float32)
                if wanted[5]:
                    grad_d += (grad * chunk.x).sum((0, 1, 3))
                grad_x, grad_dt, grad_decays, grad_b, grad_c, grad_state = _chunk_backward(
                    chunk, states.pop(), d, grad, grad_state
                )
                grad_dt += grad_decays * a
                grad_raw = grad_dt.mul_(torch.sigmoid(chunk.raw))
                low, high = options.time_step_limit
                if low > 0 or high != float("inf"):
                    soft = F.softplus(chunk.raw)
                    grad_raw.mul_((soft >= low) & (soft <= high))
                if wanted[2]:
                    grad_a += (grad_decays * chunk.dt).sum((0, 1))
                if wanted[6]:
                    grad_bias += grad_raw.sum((0, 1))
                for whole, part in zip(grads, (grad_x, grad_raw, grad_b, grad_c), strict=True):
                    whole[:, span] = part
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


def _scores(chunk: _Chunk, decay: Tensor) -> Tensor:
    """(b, h, l, l) fp32: (C Bᵀ) of the head's group times the decay, in place of `decay`."""
    scores = (chunk.c @ chunk.b.transpose(-1, -2)).float()  # (b, g, l, l)
    batch, _, length, _ = decay.shape
    decay.view(batch, chunk.groups, -1, length, length).mul_(scores[:, :, None])
    return decay


def _output(chunk: _Chunk, state: Tensor, d: Tensor) -> Tensor:
    """y (b, l, h, p) fp32 = decay * (C h0) + M (dt x) + D x."""
    from_state = chunk.c @ chunk.state_by_group(state).transpose(-1, -2)
    y = chunk.by_head(from_state).float() * chunk.decay_from_start()[..., None]
    scores = _scores(chunk, chunk.decay_matrix()).to(chunk.x.dtype)
    weighted = chunk.x * chunk.dt.to(chunk.x.dtype)[..., None]
    y += (scores @ weighted.transpose(1, 2)).transpose(1, 2)
    return y.addcmul_(chunk.x, d.to(chunk.x.dtype)[:, None])


def _chunk_backward(
    chunk: _Chunk, state: Tensor, d: Tensor, grad: Tensor, grad_end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one chunk, from those of its output (b, l, h, p) and of its last state (b, h, p, n), both fp32.

    Returns those of x, dt (as it scales x), A dt (b, l, h), B, C (b, l, g, n) and the chunk's first state.
    """
    dtype = chunk.x.dtype
    groups = chunk.groups
    batch, length, heads, _ = chunk.x.shape
    x = chunk.x.float()
    weighted = x * chunk.dt[..., None]  # dt x
    grad_heads = grad.transpose(1, 2).to(dtype)  # (b, h, l, p)

    # Inside the chunk: Y = M (dt x), M = G * decay.
    decay = chunk.decay_matrix()
    grad_scores = (grad_heads @ weighted.transpose(1, 2).to(dtype).transpose(-1, -2)).float().mul_(decay)
    grad_products = grad_scores.view(batch, groups, heads // groups, length, length).sum(2).to(dtype)  # dG
    scores = _scores(chunk, decay)
    # sum over j of dM * M, less sum over i: what the exponent's two ends receive. dM * decay * G is dM * M.
    products = (chunk.c @ chunk.b.transpose(-1, -2)).float()[:, :, None]
    # On the diagonal the two cancel: left out, because with strong decay it is the largest and its rounding would stay.
    grad_exponent = grad_scores.view(batch, groups, -1, length, length).mul_(products).view(grad_scores.shape).tril_(-1)
    grad_cumulative = (grad_exponent.sum(-1) - grad_exponent.sum(-2)).transpose(1, 2)  # (b, l, h)
    del grad_exponent, grad_scores, products
    grad_weighted = (scores.to(dtype).transpose(-1, -2) @ grad_heads).transpose(1, 2).float()
    del scores, decay, grad_heads
    grad_c = grad_products @ chunk.b
    grad_b = grad_products.transpose(-1, -2) @ chunk.c

    # From the first state: Y += decay_from_start * (C h0).
    start = chunk.state_by_group(state)
    from_start = chunk.decay_from_start()[..., None]
    scaled = grad * from_start
    grad_cumulative += (scaled * chunk.by_head(chunk.c @ start.transpose(-1, -2))).sum(-1)
    scaled = chunk.by_group(scaled.to(dtype))
    grad_c = grad_c + scaled @ start
    grad_start = (scaled.transpose(-1, -2) @ chunk.c).float().view(state.shape)
    del scaled, start

    # Into the last state: h1 = decay_last * h0 + (decay_to_end dt x)ᵀ B.
    end = chunk.state_by_group(grad_end)
    to_end = chunk.decay_to_end()[..., None]
    grad_b = grad_b + chunk.by_group((weighted * to_end).to(dtype)) @ end
    through = chunk.by_head(chunk.b @ end.transpose(-1, -2)).float() * to_end
    grad_weighted += through
    grad_to_end = through.mul_(weighted).sum(-1)  # times its own decay: d exponent
    grad_to_end[:, -1] = 0  # the last token does not decay
    last = chunk.cumulative[0][..., -1].exp()[..., None, None]  # (b, h, 1, 1)
    grad_start.addcmul_(grad_end, last)
    grad_cumulative -= grad_to_end
    grad_cumulative[:, -1] += grad_to_end.sum(1) + (grad_end * state).sum((-1, -2)) * last[..., 0, 0]

    grad_decays = grad_cumulative.flip(1).cumsum(1).flip(1)
    grad_x = torch.addcmul(grad * d.float()[:, None], grad_weighted, chunk.dt[..., None])
    return (
        grad_x,
        grad_weighted.mul_(x).sum(-1),
        grad_decays,
        grad_b.transpose(1, 2),
        grad_c.transpose(1, 2),
        grad_start,
    )
