"""The plugin's options: what contradicts is refused before anything runs."""

import subprocess
import sys

import pytest

from helpers import ROOT


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--card", "rtx-4050"), "rtx-4050-laptop-6gb"),
        (("--gpu", "--card", "t4-16gb"), "give one"),
        (("--vram-cap", "6GB"), "add --gpu"),
        (("--gpu", "--vram-cap", "6 Gigs"), "unknown unit"),
    ],
)
def test_options_that_cannot_work(options: tuple[str, ...], said: str) -> None:
    run = collect(*options)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_every_recipe_is_in_the_matrix() -> None:
    listed = collect().stdout
    for recipe in (ROOT / "bench" / "recipes").glob("*.yaml"):
        if recipe.stem not in ("demo", "lean-host"):  # one trains on a CPU, one takes minutes (bench/test_lean.py)
            assert f"test_budget[{recipe.stem}]" in listed
