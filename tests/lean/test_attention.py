"""Attention by tiles of queries and blocks of keys against PyTorch's own, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean import attention
from qlora_lowmem.lean.attention import KeyValues

from .conftest import relative


def by_tiles(q: Tensor, k: Tensor, v: Tensor, tile: int, valid: Tensor | None) -> list[Tensor]:
    """Output and gradients, forward over tiles in order, backward in reverse, each tile recomputed."""
    seq = q.shape[1]
    spans = [slice(s, min(s + tile, seq)) for s in range(0, seq, tile)]
    cache = KeyValues(seq, 0.2, valid)
    outputs = []
    for span in spans:
        cache.write(span.start, k[:, span], v[:, span])
        outputs.append(cache.attend(span.start, q[:, span], k[:, span], v[:, span]))
    weights = upstream(q)
    gradients = [torch.empty_like(t) for t in (q, k, v)]
    for span in reversed(spans):
        parts = [t[:, span].detach().requires_grad_() for t in (q, k, v)]
        out = cache.attend(span.start, *parts)
        for whole, part in zip(gradients, torch.autograd.grad(out, parts, weights[:, span]), strict=True):
            whole[:, span] = part
    return [torch.cat(outputs, 1), *gradients]


def plain(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> list[Tensor]:
    seq = q.shape[1]
    visible = torch.ones(seq, seq, dtype=torch.bool).tril()[None, None]
    if valid is not None:
        visible = visible & valid[:, None, None, :]
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    first = [t.transpose(1, 2) for t in tensors]
    out = F.scaled_dot_product_attention(*first, attn_mask=visible, scale=0.2, enable_gqa=True).transpose(1, 2)
    return [out, *torch.autograd.grad(out, tensors, upstream(q).to(out.dtype))]


def upstream(q: Tensor) -> Tensor:
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(q.dtype)


def random_qkv(batch: int, seq: int, kv_heads: int, groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seq)
    heads = [kv_heads * groups, kv_heads, kv_heads]
    return [torch.randn(batch, seq, h, 8, generator=g).to(dtype) for h in heads]


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    seq=st.integers(1, 40),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    tile=st.integers(1, 45),
    keys=st.integers(1, 20),
    padding=st.integers(-10, 10),
)
def test_equals_plain_attention(
    batch: int, seq: int, kv_heads: int, groups: int, tile: int, keys: int, padding: int
) -> None:
    q, k, v = random_qkv(batch, seq, kv_heads, groups)
    valid = None
    if padding:
        valid = torch.ones(batch, seq, dtype=torch.bool)
        valid[0, slice(0, padding) if padding > 0 else slice(padding, None)] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_PLAIN_KEYS", keys)
        lean = by_tiles(q, k, v, tile, valid)
    for ours, true in zip(lean, plain(q, k, v, valid), strict=True):
        assert (ours - true).norm() <= 1e-5 * true.norm() + 1e-6


def test_no_further_from_the_truth_in_bf16() -> None:
    q, k, v = random_qkv(2, 200, 2, 3, torch.bfloat16)
    truth = plain(q.float(), k.float(), v.float(), None)
    for ours, theirs, true in zip(by_tiles(q, k, v, 32, None), plain(q, k, v, None), truth, strict=True):
        assert relative(ours, true) <= 1.05 * relative(theirs, true)
