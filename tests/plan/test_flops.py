"""FLOPs by the formulas of PyTorch and ours for a 4-bit product; checkpointing runs each layer forward once more."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers import RECIPES
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.cache import RunCache
from qlora_lowmem.plan.flops import FlopCount, product_with_4bit
from qlora_lowmem.plan.runs import Runs, Tally
from qlora_lowmem.recipe.io import load_recipe, replace_fields
from qlora_lowmem.virtual_gpu import Server, get_card

CARD = get_card("rtx-3060-laptop-6gb")


def test_forward_and_backward_of_a_product() -> None:
    inputs, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    with FlopCount() as counted:
        torch.nn.functional.linear(inputs, weight).sum().backward()
    assert counted.total == 2 * (2 * 3 * 5 * 7)  # the product, and the inputs' gradient


def test_a_checkpoint_is_run_forward_twice() -> None:
    inputs, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)

    def squared(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) ** 2

    with FlopCount() as counted:
        checkpoint(squared, inputs, use_reentrant=False).sum().backward()
    product = 2 * 3 * 5 * 7
    assert counted.total == 4 * product  # twice forward, and the gradients of both operands


def test_a_product_with_a_4bit_weight_is_one_with_its_shape() -> None:
    assert product_with_4bit(torch.empty(2, 3, 5), torch.empty(0), [7, 5]) == 2 * 2 * 3 * 5 * 7


def test_of_a_whole_step_on_a_virtual_card(tiny_hybrid: Path, planning_server: Server) -> None:
    """Without checkpointing, and with it: every layer's forward comes on top, and nothing else."""
    config = json.loads((tiny_hybrid / "config.json").read_text())
    plain = replace_fields(
        load_recipe(RECIPES / "optimised.yaml"),
        {"model": str(tiny_hybrid), "max_seq_length": 64, "gradient_checkpointing": False},
    )
    checkpointed = replace_fields(plain, {"gradient_checkpointing": True})
    wrong = replace_fields(plain, {"target_modules": ("no_such_layer",)})
    runs = Runs(planning_server, RunCache(None))
    both = [runs.count_flops(recipe, CARD, Tally()) for recipe in (plain, checkpointed)]
    fails = runs.count_flops(wrong, CARD, Tally())
    once, twice = (future.result() for future in both)
    head = 2 * 64 * config["hidden_size"] * config["vocab_size"]
    assert once > 3 * head, "forward, once more in the fused loss, and its gradient"
    assert once < twice < 2 * once
    with pytest.raises(QloraLowmemError, match=r"counting FLOPs failed.*no_such_layer"):
        fails.result()
