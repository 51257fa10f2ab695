"""LoRA as one operation, beside PEFT's own layers: outputs, gradients, and what stays with PEFT."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_lowmem.lean.adapters import _Adapted, patch_adapters

from .conftest import relative


def adapted(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24))
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "1"], "init_lora_weights": False}
    return get_peft_model(base, LoraConfig(**fields | changes), autocast_adapter_dtype=False).train()


def outcome(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Output, x's gradient and those of the adapters; and how many layers ran as one operation."""
    x = x.clone().requires_grad_()
    out = model(x)
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [before for before, _ in node.next_functions]
    ours = sum(type(node).__name__ == f"{_Adapted.__name__}Backward" for node in seen)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *trained], weights)], ours


@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradients(autocast: bool) -> None:
    plain, x = adapted(), torch.randn(2, 9, 24)
    lean = copy.deepcopy(plain)
    patch_adapters(lean, 2**20)
    truth, _ = outcome(plain, x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if autocast:  # a frozen weight in 16 bits, as a base model has it
            for model in (plain, lean):
                for name, parameter in model.named_parameters():
                    parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
        theirs, none = outcome(plain, x)
        ours, both = outcome(lean, x)
    assert (none, both) == (0, 2)
    for one, other, true in zip(ours, theirs, truth, strict=True):
        assert one.dtype == other.dtype
        assert relative(one, true) <= max(1e-6, 1.1 * relative(other, true))


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_more_than_plain_lora_stays_with_peft(changes: dict[str, Any]) -> None:
    plain, x = adapted(**changes), torch.randn(2, 9, 24)
    lean = copy.deepcopy(plain)
    patch_adapters(lean, 2**20)
    torch.manual_seed(3)
    theirs, _ = outcome(plain, x)
    torch.manual_seed(3)
    ours, none = outcome(lean, x)
    assert none == 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_switched_off_adapters_are_off_and_a_copy_has_its_own() -> None:
    lean, x = adapted(), torch.randn(2, 9, 24)
    patch_adapters(lean, 2**20)
    patch_adapters(lean, 2**20)
    other = copy.deepcopy(lean)
    with torch.no_grad(), other.disable_adapter():
        without = other(x)
        for name, parameter in other.named_parameters():
            parameter.mul_(0 if "lora" in name else 1)
    assert relative(other(x), without) < 1e-6
    assert relative(lean(x), without) > 1e-2
