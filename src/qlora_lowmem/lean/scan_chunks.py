"""Chunks of the Mamba-2 scan: what is computed from the inputs of a few chunks at a time, by `scan.py`.

Notation: b batch, m chunks of a block, l length of a chunk, g groups, h heads, p head_dim, n state. A block of chunks
is folded into the batch: (b, m l, ...) becomes (b m, l, ...).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# A GPU gets a quarter of the launches: 4 x 48 x 64 x 64 x 4 bytes = 3 MiB a temporary, and 4 x 1.5 MiB of states.
CHUNKS_TOGETHER = 4


@dataclass(frozen=True)
class ScanOptions:
    """What a scan needs besides tensors. `time_step_limit` clamps dt after its softplus."""

    chunk_length: int = 64
    time_step_limit: tuple[float, float] = (0.0, float("inf"))


def blocks(seq: int, chunk_length: int) -> Iterator[tuple[slice, int]]:
    """Spans of the sequence with the number of equal chunks in each; the rest that fills no chunk comes last."""
    whole = seq - seq % chunk_length
    for start in range(0, whole, CHUNKS_TOGETHER * chunk_length):
        stop = min(start + CHUNKS_TOGETHER * chunk_length, whole)
        yield slice(start, stop), (stop - start) // chunk_length
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


def chunks_of(
    dtype: torch.dtype,
    block: tuple[slice, int],
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    options: ScanOptions,
) -> Chunks:
    raw = fold(dt, block).float() + dt_bias
    step = F.softplus(raw).clamp_(*options.time_step_limit)
    exact = (step * a).transpose(1, 2).double().cumsum(-1)  # a few thousand numbers: doubles cost nothing here
    high = exact.float()
    low = exact.sub_(high).float()
    return Chunks(
        block[1],
        fold(x, block).to(dtype),
        fold(b, block).transpose(1, 2).to(dtype),
        fold(c, block).transpose(1, 2).to(dtype),
        raw,
        step,
        (high, low),
    )


def fold(t: Tensor, block: tuple[slice, int]) -> Tensor:
    """(b, seq, ...) to the block's chunks (b m, l, ...)."""
    span, count = block
    chunks: Tensor = t[:, span].unflatten(1, (count, -1))
    return chunks.flatten(0, 1)
