"""What tests of this folder share: a hub."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def hub(tiny_hybrid: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has fetched the config.json, and nothing else, of `someone/some-model`."""
    model = tmp_path / "hub" / "models--someone--some-model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(tiny_hybrid / "config.json", model / "snapshots" / commit)
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
