"""The floor counts what is stored, once each, wherever bitsandbytes keeps the constants."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora_lowmem.memory.owners import floor_of, quantisation_tensors


def quantised() -> nn.Sequential:
    """One linear layer of (64, 128) in 4 bits: two weights a byte."""
    layer = Linear4bit(128, 64, bias=False, compress_statistics=True, quant_type="nf4")
    return nn.Sequential(layer.to("cpu"))


@pytest.mark.parametrize("shared_out", [False, True])
def test_constants_count_once(shared_out: bool) -> None:
    """Also where the weight has lost them: FSDP2 makes its shards plain parameters, and the layer keeps the constants,
    whole on every card.
    """
    model = quantised()
    state = model[0].quant_state
    constants = sum(tensor.numel() * tensor.element_size() for _, tensor in quantisation_tensors(state))
    assert constants > 0
    if shared_out:
        model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(torch.Tensor), requires_grad=False)
        assert not hasattr(model[0].weight, "quant_state")
    found = floor_of(model, None, residual_elements=10)
    assert (found.weights, found.adapters, found.residual) == (64 * 128 // 2 + constants, 0, 2 * 10 * 2)
    assert found.total == found.weights + found.residual
