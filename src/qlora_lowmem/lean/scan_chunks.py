"""What a Mamba-2 scan reads, and its chunks: decays, products with B and C, the states between them.

Notation of shapes: b batch, m chunks of a block, l length of a chunk, g groups, h heads, p head_dim, n state. A block
of chunks is folded into the batch: (b, m l, ...) becomes (b m, l, ...), its last chunk filled up with zeros.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

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
