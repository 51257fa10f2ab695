"""A decoder layer run tile by tile along the sequence, forward and backward, exactly.

What a layer keeps for backward grows with the tokens that it has seen: about 74 KiB a token for a Mamba layer of
Granite-4.0-H-1B with all linear layers trained, 74 MiB at 1,024 tokens and 9 GiB at 131,072. Only the layer's input
(3 KiB a token) has to exist for the whole sequence: a layer reads the past through a *carry* (the convolution's tail
and the scan's state, 1.5 MiB; for attention, keys and values), so a tile can be computed, and recomputed, alone.

Backward sweeps the tiles once without gradients for the carry at the start of each (kept from forward, they would pile
up over all layers), then walks them in reverse: recompute one tile with gradients, go back through it, pass the carry's
gradient on. Within a tile the feed-forward part has no carry at all, so it runs and is freed in tiles of its own before
the mixer's graph is walked: the two never exist together at their largest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Carry = tuple[Tensor, ...]


class TiledLayer(Protocol):
    """A decoder layer as `y = feed_forward(mix(x))`. x and y are (batch, seq, hidden), a tile part of seq.

    `shared` is what all tiles of one pass see (keys and values), or None.
    """

    mixer_parameters: Sequence[Tensor]
    feed_forward_parameters: Sequence[Tensor]

    def begin(self, x: Tensor) -> tuple[Any, Carry]:
        """`shared` and the first carry for a sequence x."""

    def mix(self, x: Tensor, start: int, shared: Any, carry: Carry) -> tuple[Tensor, Carry]:
        """The mixer with its residual, for the tile x at position `start`, and the next tile's carry."""

    def advance(self, x: Tensor, start: int, shared: Any, carry: Carry) -> Carry:
        """The next tile's carry alone. Random numbers must be drawn in the order in which `mix` draws them."""

    def feed_forward(self, h: Tensor) -> Tensor:
        """The feed-forward part with its residual, token by token."""


def spans(start: int, stop: int, step: int) -> list[slice]:
    """[start, stop) in slices of `step`, of which the last may be shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


@dataclass(frozen=True)
class TilePlan:
    """Tile lengths in tokens, and the seed that a layer's dropout is replayed from (None: there is no dropout)."""

    tile_length: int
    feed_forward_tile_length: int
    seed: int | None = None

    def tiles(self, seq: int) -> list[slice]:
        return spans(0, seq, self.tile_length)

    @property
    def forward(self) -> "TilePlan":
        """The plan of a pass without gradients, which keeps nothing for backward: a tile takes less than half of the
        memory, so it may be twice as long. Dropout is replayed tile by tile, which then are the same."""
        if self.seed is not None:
            return self
        return replace(
            self, tile_length=2 * self.tile_length, feed_forward_tile_length=2 * self.feed_forward_tile_length
        )

    def feed_forward_tiles(self, tile: slice) -> list[slice]:
        """Tiles of the feed-forward part within a tile, in positions of the sequence."""
        return spans(tile.start, tile.stop, self.feed_forward_tile_length)

    @contextmanager
    def random(self, start: int, part: int, device: torch.device) -> Iterator[None]:
        """Random numbers that depend on the layer's seed, the tile and the part of the layer, not on the order of
        tiles: backward walks them in reverse and must drop the same elements."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed + 2 * start + part)
            yield


def forward_in_tiles(layer: TiledLayer, x: Tensor, out: Tensor, plan: TilePlan) -> None:
    """Write the layer's output for x into out, both (batch, seq, hidden). out may be x: each tile is read before it is
    written, and the carry holds what later tiles need. Call without gradients."""
    shared, carry = layer.begin(x)
    plan = plan.forward
    for tile in plan.tiles(x.shape[1]):
        with plan.random(tile.start, 0, x.device):
            h, carry = layer.mix(x[:, tile], tile.start, shared, carry)
        for part in plan.feed_forward_tiles(tile):
            with plan.random(part.start, 1, x.device):
                out[:, part] = layer.feed_forward(h[:, part.start - tile.start : part.stop - tile.start])
        del h


class GradientSum:
    """Gradients of parameters, summed over tiles in fp32 (a layer's adapters at rank 8: 0.9 MiB).

    In bf16 a sum of many tiles would stop growing once a tile's share falls below 1/256 of it. The gradients of all
    parameters are cast, and added, in one launch; of one tile alone they are the sum as they are.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._only: list[Tensor | None] | None = None  # of the first tile, until there is another
        self._sums: dict[int, Tensor] = {}

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        if self._only is None and not self._sums:
            self._only = list(gradients)
            return
        if self._only is not None:
            first, self._only = self._only, None
            self._sums = _wide(first)
        found = _wide(gradients)
        both = self._sums.keys() & found.keys()
        if both:
            torch._foreach_add_([self._sums[i] for i in both], [found[i] for i in both])
        self._sums = found | self._sums

    def take(self) -> list[Tensor | None]:
        """The sums in their parameters' dtype."""
        if self._only is not None:
            return [None if g is None else g.to(p.dtype) for g, p in zip(self._only, self._parameters, strict=True)]
        places = list(self._sums)
        taken: list[Tensor | None] = [None] * len(self._parameters)
        sums = [self._sums[i] for i in places]
        ends = [torch.empty_like(s, dtype=self._parameters[i].dtype) for i, s in zip(places, sums, strict=True)]
        if ends:
            torch._foreach_copy_(ends, sums)
        for place, end in zip(places, ends, strict=True):
            taken[place] = end
        self._sums.clear()
        return taken


def _wide(gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Copies in fp32 of those that there are, by their place."""
    there = {place: g for place, g in enumerate(gradients) if g is not None}
    wide = {place: torch.empty_like(g, dtype=torch.float32) for place, g in there.items()}
    if there:
        torch._foreach_copy_(list(wide.values()), list(there.values()))
    return wide


def backward_in_tiles(layer: TiledLayer, x: Tensor, grad: Tensor, plan: TilePlan, wants_x: bool) -> list[Tensor | None]:
    """Gradients of the layer's parameters, mixer first, from the gradient of its output.

    Args:
        x: (batch, seq, hidden), the layer's input.
        grad: (batch, seq, hidden), the gradient of its output; overwritten tile by tile with that of its input.
        plan: as in forward.
        wants_x: whether the input's gradient is needed; without it grad is left undefined.
    """
    shared, carry = layer.begin(x)
    tiles = plan.tiles(x.shape[1])
    carries = [carry]
    # Where nothing is carried, the sweep is for what is shared, in longer tiles.
    sweep = tiles[:-1] if carry else spans(0, tiles[-1].start, plan.forward.tile_length)
    with torch.no_grad():
        for tile in sweep:
            with plan.random(tile.start, 0, x.device):
                carry = layer.advance(x[:, tile], tile.start, shared, carry)
            carries.append(carry)
    carries += [()] * (len(tiles) - len(carries))
    mixer, feed_forward = GradientSum(layer.mixer_parameters), GradientSum(layer.feed_forward_parameters)
    wants_mixer = wants_x or bool(layer.mixer_parameters)
    grad_carry: Sequence[Tensor | None] = [None] * len(carry)
    for tile in reversed(tiles):
        carry = carries.pop()
        carried = bool(carries)  # the first tile's carry is a constant
        with torch.enable_grad():
            tile_x = x[:, tile].detach().requires_grad_(wants_x)
            carry = tuple(t.detach().requires_grad_(carried) for t in carry)
            with plan.random(tile.start, 0, x.device):
                h, next_carry = layer.mix(tile_x, tile.start, shared, carry)
        for part in plan.feed_forward_tiles(tile):
            rows = h[:, part.start - tile.start : part.stop - tile.start].detach().requires_grad_(wants_mixer)
            _backward_feed_forward(layer, rows, part, grad, plan, feed_forward)
        if not wants_mixer:
            continue
        sinks = [*([tile_x] if wants_x else []), *(carry if carried else ()), *layer.mixer_parameters]
        ends = [(t, g) for t, g in zip(next_carry, grad_carry, strict=True) if g is not None and t.requires_grad]
        outputs, gradients = [h, *(t for t, _ in ends)], [grad[:, tile], *(g for _, g in ends)]
        del h, next_carry, ends
        found = list(torch.autograd.grad(outputs, sinks, gradients, allow_unused=True))
        del outputs, gradients
        if wants_x:
            grad[:, tile] = found.pop(0)
        grad_carry, found = (found[: len(carry)], found[len(carry) :]) if carried else ([], found)
        mixer.add(found)
    return [*mixer.take(), *feed_forward.take()]


def _backward_feed_forward(
    layer: TiledLayer, rows: Tensor, part: slice, grad: Tensor, plan: TilePlan, total: GradientSum
) -> None:
    """Back through the feed-forward part of one tile, whose input is `rows`; its gradient overwrites grad[:, part]."""
    sinks = [*([rows] if rows.requires_grad else []), *layer.feed_forward_parameters]
    if not sinks:
        return
    with torch.enable_grad(), plan.random(part.start, 1, rows.device):
        out = layer.feed_forward(rows)
    found = list(torch.autograd.grad(out, sinks, grad[:, part], allow_unused=True))
    if rows.requires_grad:
        grad[:, part] = found.pop(0)
    total.add(found)
