"""Segments: their lengths against every other division, and what is kept while they run."""

import itertools

import pytest
import torch
from torch import Tensor

from qlora_lowmem.lean.checkpointing import DeviceStore, run_layers, segment_lengths
from qlora_lowmem.lean.tiles import TilePlan


def slots(lengths: tuple[int, ...]) -> int:
    """Checkpoints at the fullest moment: those of the segments up to this one, and its other layers' inputs."""
    return max(index + length for index, length in enumerate(lengths))


@pytest.mark.parametrize("layers", range(1, 13))
def test_no_division_needs_fewer_slots(layers: int) -> None:
    ours = segment_lengths(layers)
    assert sum(ours) == layers
    assert min(ours) >= 1
    divisions = (
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))
        for count in range(layers)
        for cuts in itertools.combinations(range(1, layers), count)
    )
    assert slots(tuple(ours)) == min(slots(division) for division in divisions)


def test_forty_layers_need_nine_slots() -> None:
    assert segment_lengths(40) == [7, 8, 7, 6, 5, 4, 3]
    assert slots(tuple(segment_lengths(40))) == 9


def test_nothing_to_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers=0"):
        segment_lengths(0)


class Doubling:
    """A layer `y = w * x` that counts its runs."""

    feed_forward_parameters: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        self.weight = torch.full((), 2.0, requires_grad=True)
        self.mixer_parameters = [self.weight]
        self.runs = 0

    def begin(self, _x):
        return None, ()

    def mix(self, x, start, _shared, carry):
        self.runs += start == 0
        return x * self.weight, carry

    def advance(self, _x, _start, _shared, carry):
        return carry

    def feed_forward(self, h):
        return h


@pytest.mark.parametrize(("checkpointing", "runs"), [("layer", [2] * 6), ("segments", [3, 3, 2, 3, 2, 2])])
def test_each_layer_runs_at_most_once_more(checkpointing: str, runs: list[int]) -> None:
    layers = [Doubling() for _ in range(6)]
    x = torch.ones(1, 5, 2, requires_grad=True)
    out = run_layers(layers, x, [TilePlan(2, 2)] * 6, checkpointing, owns_gradient=False)
    out.sum().backward()
    assert torch.equal(out, 64 * torch.ones_like(x))
    assert torch.equal(x.grad, 64 * torch.ones_like(x))
    assert [layer.weight.grad.item() for layer in layers] == [320.0] * 6
    # forward, the recomputation with gradients, and in `segments` once more for all but a segment's last layer
    assert [layer.runs for layer in layers] == runs


def test_backward_twice_is_an_error() -> None:
    layers = [Doubling()]
    out = run_layers(layers, torch.ones(1, 2, 2), [TilePlan(2, 2)], "layer", owns_gradient=False).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        out.backward()


def test_a_checkpoint_is_forgotten_when_taken() -> None:
    store = DeviceStore()
    store.put(3, torch.ones(1))
    store.take(3)
    with pytest.raises(RuntimeError, match="freed as backward uses it"):
        store.take(3)
