"""A budget counts all processes of a test together, however they are started and end."""

import json
from collections.abc import Callable

import pytest

from gate.random_budgets import read_ends, write_tests
from gate.random_programs import limit_of, program
from gate.user_project import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("built")]


def test_random_programs_pass_exactly_when_they_are_within_budget(
    pytester: pytest.Pytester, run_here: Callable[..., Run]
) -> None:
    """bench/test_gate_property.py has 200 of them; these start no process that imports torch."""
    programs = {str(seed): program(seed) for seed in range(12)}
    limits = {name: limit_of(each, int(name)) for name, each in programs.items()}
    write_tests(pytester.path, [(name, each, limits[name]) for name, each in programs.items()])
    run = run_here("--junitxml=junit.xml")
    ends = read_ends(pytester.path / "junit.xml")
    assert {name: end.allocated for name, end in ends.items()} == {n: p.peak for n, p in programs.items()}, run.stdout
    assert {n: end.passed for n, end in ends.items()} == {n: p.peak <= limits[n] for n, p in programs.items()}


def test_a_baseline_has_what_child_processes_held(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    file, flags = pytester.path / "test_it.py", ("--vram-baselines", "peaks")
    body = """
import multiprocessing, pytest, torch

def take():
    torch.empty({}, device="cuda")

@pytest.mark.vram_budget("1 GB")
def test_it():
    child = multiprocessing.get_context("fork").Process(target=take)
    child.start()
    child.join()
"""
    file.write_text(body.format("2**20"))
    assert run_here(*flags, "--vram-record").returncode == 0
    (case,) = json.loads((pytester.path / "peaks" / "rtx-4050-laptop-6gb.json").read_text())["cases"].values()
    assert case["allocated"] == 4 * 2**20
    assert run_here(*flags).returncode == 0
    file.write_text(body.format("2**20 + 1"))
    regressed = run_here(*flags)
    assert "REGRESSED" in regressed.stdout
    assert "1 other process of the test used the card" in regressed.stdout


def test_what_workers_import_knows_the_card_that_a_test_is_on(
    pytester: pytest.Pytester, run_here: Callable[..., Run]
) -> None:
    """Inductor keeps the function that it asks with, and workers import it where there is no card yet."""
    (pytester.path / "test_it.py").write_text("""
import pytest
from torch._dynamo.device_interface import get_interface_for_device

@pytest.mark.vram_budget("1 GB", card="rtx-4050-laptop-6gb")
def test_it():
    assert get_interface_for_device("cuda").get_device_properties(0).multi_processor_count == 20
""")
    run = run_here()
    assert run.returncode == 0, run.stdout
