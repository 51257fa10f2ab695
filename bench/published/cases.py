"""The measured iterations of `measured.csv`: what is alive when the counter is reset, and which torch calls are made.

No code of Liger-Kernel. What is easy to lose, and shows in the figures:

- Gradients are not set to None between iterations, so the measured one starts with the last one's `.grad` alive and
  adds to them in place.
- `retain_graph=True` keeps saved tensors until the output dies at the end of the iteration.
- Several benchmarks build the modules of two implementations at once; the weights of the one that is not measured
  stay alive (`other` below).
- A `forward` row was measured in a process that had run backward before, so both cuBLAS workspaces exist: that of the
  main thread's handle and that of autograd's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """One row: the swept size, what is measured (`full`, `forward` or `backward`) and the rest of its configuration."""

    x: int
    mode: str
    config: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The row's own dtype."""
        return {"torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}[self.config["dtype"]]


CASES: dict[str, Callable[[Setting], Step]] = {}


def case(name: str) -> Callable[[Callable[[Setting], Step]], Callable[[Setting], Step]]:
    """Register the case `name` of `measured.csv`."""

    def add(make: Callable[[Setting], Step]) -> Callable[[Setting], Step]:
        CASES[name] = make
        return make

    return add


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random tensor on the card that gets a gradient."""
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def create_workspaces() -> None:
    """Multiply matrices once, forward and backward: two cuBLAS handles, each with its workspace."""
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    (torch.randn(64, 64, device="cuda") @ weight).sum().backward()


def three_modes(mode: str, forward: Callable[[], torch.Tensor], output_gradient: Callable[[], torch.Tensor]) -> Step:
    """Forward alone, backward alone or both, with a random gradient of the output and the graph retained."""
    if mode == "forward":
        create_workspaces()

        def step() -> None:
            forward()  # the output dies at once

    elif mode == "backward":
        gradient = output_gradient()
        output = forward()

        def step() -> None:
            output.backward(gradient, retain_graph=True)

    else:

        def step() -> None:
            output = forward()
            output.backward(torch.randn_like(output), retain_graph=True)

    return step
