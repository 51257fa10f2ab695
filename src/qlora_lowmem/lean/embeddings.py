"""Input embedding and LM head from one table in 8 or 4 bits.

Granite's table of 100,352 x 1,536 is 294 MiB in bf16, shared by both ends (tied), and frozen in QLoRA. With one bf16
scale a block of 64 numbers: 8 bits 147 + 4.6 MiB, 4 bits 73.5 + 4.6 MiB. The lookup dequantises the rows it is asked
for; the head dequantises a part of the vocabulary at a time (`_TILE_BYTES`), twice a tile of tokens: once for the
logits, once for their gradient. It changes the model a little, so it is off unless asked for.

4 bits are NF4 (Dettmers et al., "QLoRA", 2023, section 3 and appendix E), 8 bits are symmetric integers.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.lean.options import Idea, RefusedOptionError
from qlora_lowmem.lean.tiles import spans

_BLOCK = 64
# A dequantised part of the vocabulary: 2,730 words of 1,536 in bf16. In 4 bits the lookup's int32 indices are as much.
_TILE_BYTES = 8 * 2**20

# Quantiles of the normal distribution, scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantisedTable(nn.Module):
    """A frozen table (words, width) in `bits` (8 or 4) bits a number, one bf16 scale for 64 numbers of a row.

    The table is made on `device`, by default where `weight` is. From a weight in host memory, no more of it than a part
    is ever on the device. With 4 bits the width must be even.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int, device: torch.device | None = None) -> None:
        super().__init__()
        words, width = weight.shape
        self.bits, self.vocabulary, self.width, self.dtype = bits, words, width, weight.dtype
        self.block = math.gcd(width, _BLOCK)
        device = device or weight.device
        codes = torch.empty(words, width if bits == 8 else width // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(words, width // self.block, dtype=torch.bfloat16, device=device)
        for part in self._parts():
            codes[part], scales[part] = self._quantise(weight[part].detach().to(device).float())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def _parts(self) -> list[slice]:
        return spans(0, self.vocabulary, max(1, _TILE_BYTES // (2 * self.width)))

    def _quantise(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        blocks = wide.view(len(wide), -1, self.block)
        # The scale is rounded first, and the numbers are quantised against what will multiply them.
        scales = blocks.abs().amax(-1).bfloat16()
        unit = blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        if self.bits == 8:
            return (unit * 127).round_().clamp_(-127, 127).add_(128).to(torch.uint8).view(len(wide), -1), scales
        levels = torch.tensor(_NF4, device=wide.device)
        between = (levels[1:] + levels[:-1]) / 2
        nibbles = torch.bucketize(unit, between, out_int32=True).view(len(wide), -1)
        return (nibbles[:, 0::2] * 16 + nibbles[:, 1::2]).to(torch.uint8), scales

    def dequantise(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., width) in dtype from (..., width) or (..., width / 2) codes and (..., blocks) scales."""
        if self.bits == 8:
            unit = codes.to(dtype).sub_(128).mul_(1 / 127)
        else:
            levels = torch.tensor(_NF4, dtype=dtype, device=codes.device)
            # One lookup a byte gives both of its numbers, so the int32 index is 2 bytes a number, not 4.
            pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], -1)  # (256, 2)
            unit = nn.functional.embedding(codes.int(), pairs).flatten(-2)
        blocks = unit.view(*unit.shape[:-1], -1, self.block)
        return blocks.mul_(scales[..., None]).flatten(-2)

    def rows(self, ids: Tensor) -> Tensor:
        """(..., width) for ids (...), in the dtype that the table had."""
        return self.dequantise(self.codes[ids], self.scales[ids], self.dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the vocabulary, dequantised: (words, width) in dtype. The `Head` of `loss.py`."""
        for part in self._parts():
            yield part, self.dequantise(self.codes[part], self.scales[part], dtype)


class QuantisedEmbedding(nn.Module):
    """Stands for `nn.Embedding` over a table that it may share with a head."""

    def __init__(self, table: QuantisedTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to (..., width)."""
        return self.table.rows(ids)


class QuantisedHead(nn.Module):
    """Stands for the LM head's `nn.Linear` where logits themselves are asked for, as in generation."""

    def __init__(self, table: QuantisedTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to logits (..., words). The table is frozen; gradients reach hidden."""
        return torch.cat([hidden @ weight.t() for _, weight in self.table.tiles(hidden.dtype)], -1)


def quantise_embeddings(causal: Any, bits: int, device: torch.device | None = None) -> Idea:
    """Replace the tied embedding and LM head by one table in `bits` bits; a model that has it already is left alone.

    Done while a model loads, it saves the 16-bit table: move the weight to host memory and name the `device`.

    Raises:
        RefusedOptionError: bits that are neither 8 nor 4; embeddings that are trained, untied or adapted; 4 bits of an
            odd width.
    """
    embedding = causal.get_input_embeddings()
    if isinstance(embedding, QuantisedEmbedding) and embedding.table.bits == bits:
        table = embedding.table
    else:
        check_quantisable(causal, bits)
        if embedding.weight.requires_grad:
            reason = "the embedding is trained"
            raise RefusedOptionError("quantised_embeddings", bits, reason, "freeze it (PEFT does) or use None")
        table = QuantisedTable(embedding.weight, bits, device)
        causal.set_input_embeddings(QuantisedEmbedding(table))
        causal.set_output_embeddings(QuantisedHead(table))
    detail = f"{table.vocabulary} x {table.width} in {bits} bits, shared with the LM head"
    return Idea("quantised_embeddings", True, detail)


def check_quantisable(causal: Any, bits: int) -> None:
    """Refuse what `quantise_embeddings` cannot replace; whether it is trained is not asked."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if bits not in (4, 8):
        reason, advice = "allowed are 8 and 4", "use None for embeddings as they are"
    elif type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        reason, advice = f"the embeddings are {kinds}, already quantised or adapted", "leave them as they are"
    elif embedding.weight is not head.weight:
        reason, advice = "the model's embedding and LM head are not tied", "use None"
    elif bits == 4 and embedding.weight.shape[1] % 2:
        reason, advice = f"4 bits need an even hidden size, and this is {embedding.weight.shape[1]}", "use 8"
    else:
        return
    raise RefusedOptionError("quantised_embeddings", bits, reason, advice)
