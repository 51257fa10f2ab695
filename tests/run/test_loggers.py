"""A logger that is not installed is refused before anything is loaded."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.errors import UsageError
from qlora_lowmem.run import preflight

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_what_to_install_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=f"python -m pip install {name}"):
        preflight.check_logger(name)
    preflight.check_logger("none")


def test_one_that_is_installed_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: object())
    preflight.check_logger("mlflow")


def test_the_command_ends_before_it_loads(command: Command, tiny_hybrid: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'wandb' else found(name, *more)\n"
    )
    flags = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--device", "cpu"]
    run = command("train", *flags, "--report-to", "wandb", timeout=60, PYTHONPATH=str(tmp_path))
    assert run.returncode == 2
    assert "pip install wandb" in run.stderr
