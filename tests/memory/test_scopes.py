"""Where a job is: the module that runs, by its name and its class, forward and backward."""

import pytest
import torch
from torch import nn

from qlora_lowmem.memory import scopes
from qlora_lowmem.memory.scopes import Scope


class Mlp(nn.Module):
    """One of a program that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two nodes, one of which is a child's."""
        return torch.sigmoid(self.up(x))


def test_a_module_has_its_class_beside_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outermost, which has no name, its class alone. Nothing is noted beside allocations: there is no CUDA here."""
    monkeypatch.setattr(scopes, "_set_metadata", lambda _note: None)
    model = nn.Sequential(Mlp())
    hooks = scopes.ProgramScopes(lambda: None)
    hooks.attach()
    try:
        window = hooks.begin_window()
        model(torch.ones(2, 2)).sum().backward()
    finally:
        hooks.remove()
    found = list(window.values())
    for name, its_class in (("", "Sequential"), ("0", "Mlp"), ("0.up", "Linear")):
        assert Scope("forward", name, "mlp" if name == "0" else "other", "", its_class) in found
    assert Scope("backward", "0", "mlp", "SigmoidBackward0", "Mlp") in found
    assert Scope("backward", "0.up", "other", "AddmmBackward0", "Linear") in found
