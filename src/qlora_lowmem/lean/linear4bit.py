"""4-bit linear layers that dequantise their weight a tile at a time.

bitsandbytes multiplies many rows by a 4-bit weight by writing the whole weight in the compute dtype first (`gemm_4bit`
does it out of sight, and the backward of `MatMul4Bit` does it again): 2 bytes a weight in bf16, 24 MiB for the largest
layer of Granite-4.0-H-1B, 48 MiB for one of Llama-3.2-3B, 112 MiB for one of an 8B model, at the moment when the
layer's activations and their gradients exist too. Here a tile of the weight is written, multiplied and freed:

- forward: rows of the weight are columns of the output, `out[:, i:j] = x @ W[i:j].T`;
- backward: columns of the weight are columns of the gradient, `grad_x[:, i:j] = grad @ W[:, i:j]`, so that no tile's
  product has to be added to another's and rounded again.

Every element of the result is the sum that it is in the plain layer. For backward only the 4-bit weight is referenced.
"""

import functools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.lean.options import Idea
from qlora_lowmem.lean.tiles import spans

# Rows up to which bitsandbytes has kernels that multiply the packed weight and write no other: left to it.
_FEW_ROWS = 64
_NESTED_BLOCK = 256  # constants that share one of their own, with double quantisation


@dataclass(frozen=True)
class PackedWeight:
    """A weight (out_features, in_features) as bitsandbytes packs it: two values a byte, row after row."""

    packed: Tensor  # in any dtype that the bytes are stored as
    state: Any  # bitsandbytes' `QuantState`

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.state.shape
        return rows, columns

    def row_tiles(self, tile_bytes: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of whole rows, (rows, in_features) each in dtype, of at most `tile_bytes` where blocks allow it; one
        tile where rows are no whole blocks."""
        rows, columns = self.shape
        block = self.state.blocksize
        a_row = columns // block
        # A tile begins where a block of the constants' own constants does.
        aligned = _NESTED_BLOCK // math.gcd(a_row, _NESTED_BLOCK) if self.state.nested else 1
        length = max(tile_bytes // (columns * dtype.itemsize) // aligned, 1) * aligned
        if columns % block:
            length = rows
        data = self._bytes().view(-1)
        for span in spans(0, rows, length):
            constants = self._constants(span.start * a_row, math.ceil(span.stop * columns / block))
            tile = data[span.start * columns // 2 : math.ceil(span.stop * columns / 2)]
            yield span, self._dequantise(tile, constants, (span.stop - span.start, columns), dtype)

    def column_tiles(self, tile_bytes: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of whole columns, (out_features, columns) each in dtype; one tile where rows are no whole blocks."""
        rows, columns = self.shape
        block = self.state.blocksize
        if columns % block or rows * columns * dtype.itemsize <= tile_bytes:
            _, whole = next(self.row_tiles(max(tile_bytes, rows * columns * dtype.itemsize), dtype))
            yield slice(0, columns), whole
            return
        constants = self._constants(0, rows * columns // block).view(rows, -1)
        data = self._bytes().view(rows, -1)
        length = max(tile_bytes // (rows * dtype.itemsize) // block, 1) * block
        for span in spans(0, columns, length):
            # bitsandbytes' kernels read both from their first byte on, whatever the strides.
            tile = data[:, span.start // 2 : span.stop // 2].contiguous()
            scales = constants[:, span.start // block : span.stop // block].contiguous()
            yield span, self._dequantise(tile, scales, (rows, span.stop - span.start), dtype)

    def _bytes(self) -> Tensor:
        return self.packed.view(-1).view(torch.uint8)

    def _constants(self, first: int, last: int) -> Tensor:
        """The fp32 constants of blocks [first, last), of which the first is the first of a block of constants too."""
        state = self.state
        if not state.nested:
            return state.absmax[first:last]  # type: ignore[no-any-return]
        outer = state.state2.absmax[first // _NESTED_BLOCK : math.ceil(last / _NESTED_BLOCK)]
        found = torch.ops.bitsandbytes.dequantize_blockwise.default(
            state.absmax[first:last], outer, state.state2.code, _NESTED_BLOCK, torch.float32
        )
        return found.add_(state.offset)  # type: ignore[no-any-return]

    def _dequantise(self, packed: Tensor, constants: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.ops.bitsandbytes.dequantize_4bit.default(  # type: ignore[no-any-return]
            packed.view(-1, 1), constants, self.state.blocksize, self.state.quant_type, shape, dtype
        )


@dataclass(frozen=True)
class TiledWeight:
    """A frozen 4-bit weight as the factor of a product; of it no more than `tile_bytes` exist dequantised at a time.

    Attributes:
        whole: multiplies rows by the whole weight at once, as bitsandbytes does; None where there are only tiles.
    """

    weight: PackedWeight
    tile_bytes: int
    whole: Callable[[Tensor], Tensor] | None = None

    def product(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T`: (n, in_features) to a new tensor (n, out_features), in rows' dtype. Without gradients."""
        if self.whole is not None:
            return self.whole(rows)
        out = rows.new_empty(rows.shape[0], self.weight.shape[0])
        for span, tile in self.weight.row_tiles(self.tile_bytes, rows.dtype):
            torch.mm(rows, tile.t(), out=out[:, span])
            del tile  # before the next is made
        return out

    def back(self, grad: Tensor) -> Tensor:
        """`grad @ weight`: (n, out_features) to a new tensor (n, in_features), in grad's dtype."""
        grad_rows = grad.new_empty(grad.shape[0], self.weight.shape[1])
        for span, tile in self.weight.column_tiles(self.tile_bytes, grad.dtype):
            torch.mm(grad, tile, out=grad_rows[:, span])
            del tile
        return grad_rows


def linear_4bit(x: Tensor, weight: PackedWeight, tile_bytes: int) -> Tensor:
    """`x @ weight.T`: (..., in_features) to (..., out_features), in x's dtype. The weight is frozen, and of it no more
    than `tile_bytes` exist dequantised at a time."""
    return _Linear4bit.apply(x, weight.packed, TiledWeight(weight, tile_bytes))  # type: ignore[no-any-return]


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, weight: TiledWeight) -> Tensor:
        del packed  # a tensor of the graph's, in the weight
        ctx.weight = weight
        with torch.autocast(x.device.type, enabled=False):
            return weight.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        weight: TiledWeight = ctx.weight
        with torch.autocast(grad_out.device.type, enabled=False):
            grad_x = weight.back(grad_out.reshape(-1, grad_out.shape[-1]))
        return grad_x.view(*grad_out.shape[:-1], -1), None, None


def patch_linear_4bit(model: nn.Module, tile_bytes: int) -> Idea | None:
    """Give bitsandbytes' 4-bit linear layers, alone or inside PEFT's, a forward that dequantises by tiles.

    A weight of no more than `tile_bytes` stays with bitsandbytes. None where the model has no such layer.
    """
    # Modules that hold a 4-bit weight themselves: PEFT's layers of the same name hold such a module.
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")
    ]
    for layer in layers:
        layer._plain_forward = layer.__dict__.get("_plain_forward") or layer.forward
        forward = functools.partial(_forward, tile_bytes=tile_bytes)
        layer.forward = types.MethodType(forward, layer)
    if not layers:
        return None
    return Idea("dequantisation", True, f"{len(layers)} 4-bit layers, their weights in tiles of {tile_bytes} bytes")


def tiled_weight(layer: Any, rows: int, dtype: torch.dtype, tile_bytes: int) -> TiledWeight | None:
    """The weight of a patched layer, for `rows` rows in dtype; None where bitsandbytes' own forward must be called:
    for few rows, at a first call, with a bias, and in the layout that it has for CPUs."""
    state = getattr(layer.weight, "quant_state", None)
    settled = state is not None and layer.compute_type_is_set and layer.bias is None
    if rows <= _FEW_ROWS or not settled or getattr(state, "packing_format_for_cpu", False):
        return None
    assert state is not None
    small = math.prod(state.shape) * dtype.itemsize <= tile_bytes
    # In evaluation bitsandbytes packs a weight anew for a CPU when rows want no gradient, as they never do in here.
    whole = layer._plain_forward if small and layer.training else None
    return TiledWeight(PackedWeight(layer.weight, state), tile_bytes, whole)


def _forward(self: Any, x: Tensor, *, tile_bytes: int) -> Tensor:
    """Mirrors `Linear4bit.forward` of bitsandbytes, which also settles what is settled at the first call."""
    dtype = self.compute_dtype or x.dtype
    weight = tiled_weight(self, x.numel() // x.shape[-1], dtype, tile_bytes)
    if weight is None or math.prod(weight.weight.shape) * dtype.itemsize <= tile_bytes:
        return self._plain_forward(x)  # type: ignore[no-any-return]
    return linear_4bit(x.to(dtype), weight.weight, tile_bytes).to(x.dtype)
