"""The plugin: options that contradict are refused before anything runs; what a project has of its own stays so."""

import subprocess
import sys
from pathlib import Path

import pytest

from gate.user_project import FEW_PLUGINS, run_pytest
from helpers import ROOT

OWN = """
import pytest

@pytest.fixture
def matrix(): return "a matrix of mine"

@pytest.fixture
def runner(): return "a runner of mine"

@pytest.mark.gpu
@pytest.mark.flaky
def test_of_a_project_with_names_like_ours(matrix, runner):
    assert (matrix, runner) == ("a matrix of mine", "a runner of mine")
"""


# What a project may well call options of its own.
NAMES = ("--results", "--gpu", "--card", "--record", "--baselines", "--report-only", "--across-versions")


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--card", "rtx-4050"), "rtx-4050-laptop-6gb"),
        (("--gpu", "--card", "t4-16gb"), "give one"),
        (("--vram-gpu", "--vram-card", "t4-16gb"), "give one"),
        (("--vram-cap", "6GB"), "add --vram-gpu"),
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


def test_a_project_keeps_its_own_markers_fixtures_and_options(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: ours\n    flaky: ours\n")
    options = [f"    parser.addoption('{name}')\n" for name in NAMES]
    (tmp_path / "conftest.py").write_text("".join(["def pytest_addoption(parser):\n", *options]))
    (tmp_path / "test_own.py").write_text(OWN)
    given = [f"{name}=mine" for name in NAMES]
    run = run_pytest(tmp_path, *FEW_PLUGINS, "--strict-markers", *given, "-q")
    assert "1 passed" in run.stdout, run.stdout + run.stderr
