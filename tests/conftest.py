"""What tests share: a tiny hybrid model as a folder, a small data file, the commands run as a user runs them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT, TINY_HYBRID
from qlora_lowmem.models.sources import architecture


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only the config.json of a four-layer Granite hybrid."""
    folder = tmp_path_factory.mktemp("tiny-hybrid")
    (folder / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | TINY_HYBRID))
    return folder


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Eight short conversations as JSON Lines."""
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus one?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m qlora_lowmem.NAME ARGUMENTS` and return what it printed and its exit code."""

    def run(name: str, *arguments: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"qlora_lowmem.{name}", *arguments],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
