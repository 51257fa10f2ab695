"""Causal attention of one tile of queries to everything before it, with exact gradients of keys and values.

For S tokens of Granite-4.0-H-1B (12 heads, 4 KV heads of 128) queries and outputs are 3 KiB a token each, and their
gradients as much again; keys and values are 1 KiB a token each. So only keys and values exist for the whole sequence,
in the model's dtype and never repeated per query head, and queries come a tile at a time.

On a GPU in half precision PyTorch's flash kernel takes a tile's queries and all keys before them in one call. Its
backward, and plain products, go by blocks of keys: softmax over a row of keys splits over them. Each block gives its
output and the logarithm of its sum of exponentials (LSE), and two blocks merge exactly. The backward of a block needs
only the final output and the final LSE (Dao, "FlashAttention-2", 2023, section 3.1; as Liu et al., "Ring Attention",
2023, split it), so it also goes block by block. That matters with grouped heads: PyTorch's flash backward first writes
dK and dV once per *query* head, 6 KiB a key: 768 MiB at 131,072 keys, 12 MiB for a block of 2,048. Their sums over
tiles of queries are kept in fp32 (4 KiB a token), because a sum of hundreds of terms in bf16 loses the small ones.

A padding mask takes the plain products, a smaller block at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from qlora_lowmem.lean.tiles import spans

# Keys that one call of the flash backward takes: 2 x 2,048 x 12 x 128 x 2 bytes = 12 MiB of expanded dK and dV.
_FLASH_KEYS = 2048
# Keys of one plain block: 12 heads x 512 queries x 256 keys x 4 bytes = 6 MiB a temporary, of which three live at once.
_PLAIN_KEYS = 256
_TINY = torch.finfo(torch.float32).tiny

_Triple = tuple[Tensor, Tensor, Tensor]


class KeyValues:
    """Keys and values of a whole sequence, and the gradients that tiles of queries add to them.

    Args:
        seq: length of the whole sequence.
        scale: of the scores.
        valid: (batch, seq) bool, False where a token is padding, or None.
    """

    # (batch, seq, kv_heads, head_dim) in memory is what the flash kernel reads; it is passed transposed. Each is made
    # when it is first written, which tells the dtype.
    keys: Tensor
    values: Tensor
    grad_keys: Tensor
    grad_values: Tensor

    def __init__(self, seq: int, scale: float, valid: Tensor | None = None) -> None:
        self.seq, self.scale, self.valid = seq, scale, valid

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Set rows from `start`; k and v (batch, tile, kv_heads, head_dim)."""
        if not hasattr(self, "keys"):
            self.keys = k.new_empty(k.shape[0], self.seq, *k.shape[2:])
            self.values = torch.empty_like(self.keys)
        self.keys[:, start : start + k.shape[1]] = k
        self.values[:, start : start + v.shape[1]] = v

    def attend(self, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output of the queries at `start`; all keys up to the tile's last must have been written.

        In backward, tiles must be walked from the last to the first: the gradient that k and v receive is the sum of
        what this tile and the tiles after it contribute.

        Args:
            q: (batch, tile, heads, head_dim).
            k, v: (batch, tile, kv_heads, head_dim): the tile's own, as the graph knows them.

        Returns:
            (batch, tile, heads, head_dim) in q's dtype.
        """
        return _Attend.apply(q, k, v, self, start)  # type: ignore[no-any-return]

    def blocks(self, tile: slice, keys: int) -> "list[_Block]":
        """Blocks of at most `keys` keys that a tile attends to, its own last."""
        past = [_Block(self, span, causal=False) for span in spans(0, tile.start, keys)]
        return [*past, _Block(self, tile, causal=True)]

    def flash_blocks(self, tile: slice, keys: int) -> "list[_Block]":
        """As `blocks`, but that the last holds, beside the tile's own keys, as many before them as `keys` leave room
        for: the flash kernels align a causal mask with the last query and the last key
        (`torch.nn.attention.bias.causal_lower_right`)."""
        own = max(min(tile.start, tile.stop - keys), 0)
        past = [_Block(self, span, causal=False) for span in spans(0, own, keys)]
        return [*past, _Block(self, slice(own, tile.stop), causal=True)]

    def accumulate(self, span: slice, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add the gradients of a block's keys and values, (batch, kv_heads, keys, head_dim)."""
        if not hasattr(self, "grad_keys"):
            self.grad_keys = torch.zeros_like(self.keys, dtype=torch.float32)
            self.grad_values = torch.zeros_like(self.values, dtype=torch.float32)
        self.grad_keys[:, span] += grad_k.transpose(1, 2)
        self.grad_values[:, span] += grad_v.transpose(1, 2)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cache: KeyValues, start: int) -> Tensor:
        del k, v  # they are in the cache; as arguments they only receive gradients
        tile = slice(start, start + q.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            heads_first = q.transpose(1, 2)
            flash = _can_use_flash(heads_first, cache)
            merged: _Triple | None = None
            if flash:  # its forward needs no memory that grows with the keys
                merged = _Block(cache, slice(0, tile.stop), causal=True).flash_forward(heads_first)
            for block in () if flash else cache.blocks(tile, _PLAIN_KEYS):
                part = block.plain_forward(heads_first)
                merged = part if merged is None else _merge(merged, part)
        assert merged is not None
        out = merged[0].to(q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, out, *merged[1:])
        ctx.cache, ctx.tile, ctx.flash = cache, tile, flash
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, out, largest, total = ctx.saved_tensors
        cache, tile = ctx.cache, ctx.tile
        with torch.autocast(q.device.type, enabled=False):
            heads_first, out, grad_out = q.transpose(1, 2), out.transpose(1, 2), grad_out.transpose(1, 2)
            blocks = cache.flash_blocks(tile, _FLASH_KEYS) if ctx.flash else cache.blocks(tile, _PLAIN_KEYS)
            grad_q: Tensor | None = None
            for block in blocks:
                backward = block.flash_backward if ctx.flash else block.plain_backward
                part, grad_k, grad_v = backward(heads_first, out, largest, total, grad_out)
                if len(blocks) > 1:
                    part = part.float() if grad_q is None else grad_q.add_(part)
                grad_q = part
                cache.accumulate(block.span, grad_k, grad_v)
            assert grad_q is not None
        grad_k, grad_v = cache.grad_keys[:, tile], cache.grad_values[:, tile]
        return grad_q.transpose(1, 2).to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype), None, None


def _can_use_flash(q: Tensor, cache: KeyValues) -> bool:
    if cache.valid is not None or not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    k, v = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
    # Multiples of 8 only: PyTorch pads other head sizes in a layer above the operator that is called here.
    return q.shape[-1] % 8 == 0 and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True))


def _merge(one: _Triple, other: _Triple) -> _Triple:
    """Outputs (b, h, l, d), largest scores and sums of exponentials (b, h, l) over two disjoint sets of keys, as over
    both. The LSE is log(total) + largest; kept apart, because rounding their sum (2e-6 at 40) is an error of every
    weight of the row."""
    largest = torch.maximum(one[1], other[1])
    # Where no key was visible in either, both are -inf, their difference is not a number, and the output is 0.
    totals = [(part[1] - largest).exp().nan_to_num_(0.0).mul_(part[2]) for part in (one, other)]
    total = totals[0] + totals[1]
    weights = [(t / total.clamp(min=_TINY))[..., None] for t in totals]
    return (one[0] * weights[0]).addcmul_(other[0], weights[1]), largest, total


class _Block:
    """A block of keys seen by a tile of queries. q, out and gradients are (batch, heads, tile, head_dim)."""

    def __init__(self, cache: KeyValues, span: slice, causal: bool) -> None:
        self.k = cache.keys[:, span].transpose(1, 2)
        self.v = cache.values[:, span].transpose(1, 2)
        self.valid = None if cache.valid is None else cache.valid[:, span]
        self.span, self.scale = span, cache.scale
        self.causal = causal  # the tile's own keys; all earlier ones are visible to every query

    def flash_forward(self, q: Tensor) -> _Triple:
        """Output and, twice, the LSE: the kernel knows no largest score and sum apart."""
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, self.k, self.v, 0.0, self.causal, False, scale=self.scale
        )
        return out, lse, lse

    def flash_backward(self, q: Tensor, out: Tensor, lse: Tensor, _: Tensor, grad_out: Tensor) -> _Triple:
        no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)  # dropout is 0: it is not read
        sizes = (None, None, q.shape[2], self.k.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad_out, q, self.k, self.v, out, lse, *sizes, 0.0, self.causal, no_seed, no_seed, scale=self.scale
        )

    def _grouped(self, t: Tensor) -> Tensor:
        """(batch, heads, tile, d) as (batch, kv_heads, heads/kv_heads * tile, d) in fp32: keys are not repeated."""
        batch, _, _, width = t.shape
        return t.float().reshape(batch, self.k.shape[1], -1, width)

    def _scores(self, q: Tensor) -> Tensor:
        """(batch, kv_heads, heads/kv_heads * tile, keys) fp32, -inf where a key is not visible."""
        scores = (self._grouped(q) * self.scale) @ self.k.float().transpose(-1, -2)
        tile, keys = q.shape[2], self.k.shape[2]
        by_query = scores.view(*scores.shape[:2], -1, tile, keys)
        if self.causal:
            hidden = torch.ones(tile, keys, dtype=torch.bool, device=q.device).triu_(1)
            by_query.masked_fill_(hidden, float("-inf"))
        if self.valid is not None:
            by_query.masked_fill_(~self.valid[:, None, None, None, :], float("-inf"))
        return scores

    def plain_forward(self, q: Tensor) -> _Triple:
        scores = self._scores(q)
        largest = scores.amax(-1, keepdim=True)
        weights = self._exponentials(scores, largest)
        total = weights.sum(-1, keepdim=True)
        out = (weights @ self.v.float()).div_(total.clamp(min=_TINY))
        return out.view(q.shape), largest.view(q.shape[:-1]), total.view(q.shape[:-1])

    def _exponentials(self, scores: Tensor, largest: Tensor) -> Tensor:
        weights = scores.sub_(largest).exp_()
        return weights if self.valid is None else weights.nan_to_num_(0.0)  # a query that sees no key

    def plain_backward(self, q: Tensor, out: Tensor, largest: Tensor, total: Tensor, grad_out: Tensor) -> _Triple:
        """With the weights P: dV = Pᵀ dO, dS = P * (dO Vᵀ - rowsum(dO * O)), dQ = dS K, dK = dSᵀ Q."""
        scores = self._scores(q)
        rows = (*scores.shape[:-1], 1)
        weights = self._exponentials(scores, largest.reshape(rows)).div_(total.reshape(rows).clamp(min=_TINY))
        grad = self._grouped(grad_out)
        grad_v = weights.transpose(-1, -2) @ grad
        delta = (grad * self._grouped(out)).sum(-1, keepdim=True)
        grad_scores = (grad @ self.v.float().transpose(-1, -2)).sub_(delta).mul_(weights).mul_(self.scale)
        grad_k = grad_scores.transpose(-1, -2) @ self._grouped(q)
        grad_q = grad_scores @ self.k.float()
        return grad_q.view(q.shape), grad_k, grad_v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, tile, heads, head_dim); cos and sin (1 or batch, tile, head_dim).

    Mirrors `apply_rotary_pos_emb` of transformers (Su et al., "RoFormer", 2021, equation 34, with split halves: a
    number is paired with the one half a head further, not with its neighbour).
    """
    return _Rotate.apply(x, cos[:, :, None], sin[:, :, None])  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _rotated(x, cos, first, second, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _rotated(grad, cos, second, first, -1), None, None


def _rotated(x: Tensor, cos: Tensor, first_sin: Tensor, second_sin: Tensor, sign: int) -> Tensor:
    """Each half of x times its cosines, plus the other half times sines, in two passes over one tensor."""
    first, second = x.chunk(2, -1)
    out = x * cos
    out_first, out_second = out.chunk(2, -1)
    out_first.addcmul_(second, first_sin, value=-sign)
    out_second.addcmul_(first, second_sin, value=sign)
    return out
