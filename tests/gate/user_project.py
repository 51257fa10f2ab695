"""A project that is not this one: its model, its test with a budget, and how pytest is run there."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TEST = """\
import os
import pytest, torch
from torch import nn


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.vram_budget("700 MiB", card="rtx-4050-laptop-6gb")
def test_step():
    model = Model(int(os.environ.get("LAYERS", "4"))).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(512, 1024, device="cuda")).square().mean().backward()
        optimizer.step()
"""


# Others cost seconds a session, and are not what is tested.
FEW_PLUGINS = ("-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:anyio")


@dataclass(frozen=True)
class Run:
    """What a session came to."""

    returncode: int
    stdout: str
    stderr: str


def run_pytest(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`pytest ARGUMENTS` in a user's folder, with the plugin as its entry point or named."""
    named = [] if "QLORA_LOWMEM_ENTRY_POINT" in env else ["-p", "qlora_lowmem.gate.plugin"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "GITHUB_"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *named, *arguments],
        cwd=folder,
        env={**clean, "COLUMNS": "160", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
