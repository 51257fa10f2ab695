"""FLOPs by the formulas of PyTorch and ours for a 4-bit product; a checkpoint is run forward twice."""

import torch
from torch.utils.checkpoint import checkpoint

from qlora_lowmem.plan.worker import FlopCount, product_with_4bit


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
