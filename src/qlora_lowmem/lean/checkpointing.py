"""Which layer inputs are kept for backward, and where.

A checkpoint of Granite-4.0-H-1B is 3 KiB a token: 3 MiB at 1,024 tokens, 384 MiB at 131,072. Forty of them are 120 MiB
and 15 GiB.

- `layer`: every layer's input. Each layer is recomputed once.
- `segments`: the inputs of a few segments. When backward comes to a segment it runs its layers once more to get their
  inputs. The checkpoints of the segments behind it have been freed by then, so earlier segments can be longer: with c
  slots the segments may be c, c - 1, ..., 1 layers long, and c (c + 1) / 2 layers need c slots: 9 for 40 layers, where
  equal segments need 2 sqrt(40) = 13 and `layer` 40. The last segment is not run twice: its layers' inputs are kept as
  forward makes them. (Two levels of the scheme of Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
  with the lengths of Griewank and Walther's revolve, 2000.)
- `host`: every layer's input, in one block of pinned host memory: S tokens need 40 x 3 KiB x S of it, which PyTorch's
  pinned allocator rounds up to a power of two (15 GiB at 131,072 tokens: 16). Copies run on a stream of their own; in
  backward the next one is fetched while a layer computes. On the GPU two residual tensors remain of forty.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_lowmem.lean.tiles import TiledLayer, TilePlan, backward_in_tiles, forward_in_tiles


def segment_lengths(layers: int) -> list[int]:
    """Lengths of segments, first to last, that need the fewest slots when each layer is run at most once more.

    With c the smallest number of slots for which c (c + 1) / 2 >= layers, segment i (from 0) may have c - i layers.
    The surplus is taken from the front, so that the last segment, which is not run again, stays as long as it can.

    Raises:
        ValueError: layers is not positive.
    """
    if layers < 1:
        raise ValueError(f"layers={layers}: there is nothing to divide; it must be at least 1")
    slots = 1
    while slots * (slots + 1) // 2 < layers:
        slots += 1
    lengths: list[int] = []
    while sum(lengths) < layers:
        lengths.append(slots - len(lengths))
    lengths[0] -= sum(lengths) - layers  # less than the last segment's length, so the first one can give it
    return lengths


def _taken(kept: dict[int, Tensor], index: int) -> Tensor:
    if index not in kept:
        raise RuntimeError(
            "a lean layer's checkpoint is freed as backward uses it; run forward again instead of backward twice"
        )
    return kept.pop(index)


class DeviceStore:
    """Checkpoints where they are."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def put(self, index: int, x: Tensor) -> None:
        self._kept[index] = x

    def take(self, index: int) -> Tensor:
        """The checkpoint, which the store then forgets.

        Raises:
            RuntimeError: it has been taken, as by a second backward through the same graph.
        """
        return _taken(self._kept, index)


class HostStore:
    """Checkpoints in pinned host memory, copied on a stream of their own, fetched one ahead in reverse order.

    Args:
        device: where checkpoints come from and go back to.
        slots: how many there will be. All have the first one's shape.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        self._stream = torch.cuda.Stream(device)
        self._slots = slots
        self._block: Tensor | None = None
        self._host: dict[int, Tensor] = {}
        self._leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self._fetched: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, index: int, x: Tensor) -> None:
        self._let_go()
        if self._block is None:
            # One block, not one a checkpoint: each would be rounded up to a power of two (384 MiB to 512). The pinned
            # allocator keeps it for the next step.
            self._block = torch.empty(self._slots, *x.shape, dtype=x.dtype, pin_memory=True)
        pinned = self._block[index]
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            pinned.copy_(x, non_blocking=True)
        self._host[index] = pinned
        # x may be freed, and its memory written, only after the copy: it is held until the next checkpoint comes, and
        # the computing stream then waits for the copy (long done). `record_stream` would leave the time to chance.
        self._leaving = x, self._stream.record_event()

    def take(self, index: int) -> Tensor:
        """The checkpoint on the device; a fetch of the one before it starts."""
        self._let_go()
        if index not in self._fetched:
            self._fetch(index)
        x, arrived = self._fetched.pop(index)
        torch.cuda.current_stream(x.device).wait_event(arrived)
        if index - 1 in self._host:
            self._fetch(index - 1)
        return x

    def _let_go(self) -> None:
        if self._leaving is not None:
            x, copied = self._leaving
            torch.cuda.current_stream(x.device).wait_event(copied)
            self._leaving = None

    def _fetch(self, index: int) -> None:
        pinned = _taken(self._host, index)
        with torch.cuda.device(self._stream.device):
            x = torch.empty(pinned.shape, dtype=pinned.dtype, device=self._stream.device)
            # The memory may have been freed by kernels that still run: the copy waits for them.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                x.copy_(pinned, non_blocking=True)
            self._fetched[index] = x, self._stream.record_event()


@dataclass
class _Segment:
    """Layers of one segment, with all that its backward needs besides its input."""

    index: int
    layers: Sequence[TiledLayer]
    plans: Sequence[TilePlan]
    store: DeviceStore | HostStore
    keeps_inner: bool
    owns_gradient: bool
    autocast: Callable[[], torch.autocast]
    inner: list[Tensor] = field(default_factory=list)


def run_layers(
    layers: Sequence[TiledLayer], x: Tensor, plans: Sequence[TilePlan], checkpointing: str, owns_gradient: bool
) -> Tensor:
    """A stack of layers, with a plan for each, over x (batch, seq, hidden), in tiles; the result has x's shape.

    Args:
        checkpointing: `layer`, `segments` or `host`.
        owns_gradient: that nobody else holds the gradient of the result, so that backward may write into it.
    """
    lengths = segment_lengths(len(layers)) if checkpointing == "segments" else [1] * len(layers)
    # Host memory is another place only on a GPU; on a CPU a checkpoint already is there.
    store = HostStore(x.device, len(lengths)) if checkpointing == "host" and x.is_cuda else DeviceStore()
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    # Casts of adapters to autocast's dtype are not cached: 17 MiB for fp32 adapters, and made without gradients.
    autocast = functools.partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)
    start = 0
    for index, length in enumerate(lengths):
        part = slice(start, start + length)
        parameters = [p for layer in layers[part] for p in _parameters(layer)]
        trains = torch.is_grad_enabled() and (x.requires_grad or bool(parameters))
        last = index == len(lengths) - 1
        segment = _Segment(
            index, layers[part], plans[part], store, trains and last, owns_gradient or not last, autocast
        )
        if trains:
            store.put(index, x.detach())
        x = _RunSegment.apply(x, segment, *parameters)
        start += length
    return x


def _parameters(layer: TiledLayer) -> list[Tensor]:
    return [*layer.mixer_parameters, *layer.feed_forward_parameters]


class _RunSegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segment: _Segment, *parameters: Tensor) -> Tensor:
        del parameters  # they only receive gradients
        ctx.segment = segment
        with segment.autocast():
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            for position, (layer, plan) in enumerate(zip(segment.layers, segment.plans, strict=True)):
                if position and segment.keeps_inner:
                    segment.inner.append(x)
                    out = torch.empty_like(x)
                # Otherwise only the segment's own input is kept: from its second layer on, in place.
                forward_in_tiles(layer, x, out, plan)
                x = out
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        segment: _Segment = ctx.segment
        x = segment.store.take(segment.index)
        with segment.autocast():
            inputs = [x, *segment.inner] if segment.keeps_inner else _inputs_again(segment, x)
            segment.inner.clear()
            del x
            # Gradients between segments pass from one backward of ours to the next, so they are written in place:
            # a second residual tensor less (384 MiB at 131,072 tokens).
            grad = grad_out if segment.owns_gradient else grad_out.clone(memory_format=torch.contiguous_format)
            del grad_out
            wants_input = ctx.needs_input_grad[0]
            gradients: list[list[Tensor | None]] = []
            for position in reversed(range(len(segment.layers))):
                layer = segment.layers[position]
                wants_x = wants_input or any(_parameters(before) for before in segment.layers[:position])
                if not wants_x and not _parameters(layer):
                    break  # nothing below is trained
                gradients.append(backward_in_tiles(layer, inputs.pop(), grad, segment.plans[position], wants_x))
        found = [g for layer_gradients in reversed(gradients) for g in layer_gradients]
        return (grad if wants_input else None, None, *found)


def _inputs_again(segment: _Segment, x: Tensor) -> list[Tensor]:
    """The inputs of all of a segment's layers. The last layer's output is not needed, so it is not run."""
    inputs = [x]
    with torch.no_grad():
        for layer, plan in zip(segment.layers[:-1], segment.plans[:-1], strict=True):
            out = torch.empty_like(inputs[-1], memory_format=torch.contiguous_format)
            forward_in_tiles(layer, inputs[-1], out, plan)
            inputs.append(out)
    return inputs
