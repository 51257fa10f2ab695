"""The matrix: every recipe of bench/recipes/ but the demo, run once on the device of this session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_recipes import ORDER, RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.cases import Matrix, Runner
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.report.matrix import write_matrix

# What takes minutes: asked for by its file or by -m, not run with the matrix.
PROOFS = {
    "chaos": "a run killed again and again",
    "ranks": "what each of several cards needs",
    "phases": "every phase of a run's life on a 6 GB card",
    "data_stream": "a file of 5 GB in constant memory",
    "published": "peaks that others measured on real cards",
    "lean": "the lean implementations, one idea a step",
    "witness": "a second method of knowing a recipe's peak",
    "claims": "the statements that guided the set-up, put to the test",
    "reality": "published fine-tuning peaks beside the plan's",
    "plan": "ten (model, card) pairs planned, and each proposal run again",
}


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of the proofs."""
    for name, what in PROOFS.items():
        config.addinivalue_line("markers", f"{name}: {what}; runs with `pytest bench/test_{name}.py` or `-m {name}`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the proofs out unless the command names their file or their marker."""
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    expression = config.getoption("markexpr") or ""
    left_out = [
        item
        for item in items
        if item.path.name not in named
        and any(item.get_closest_marker(name) and name not in expression for name in PROOFS)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT] = sorted({item.path.stem for item in left_out})


_LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out and how it is run."""
    for name in config.stash.get(_LEFT_OUT, []):
        terminalreporter.write_line(f"left out, for it takes minutes: pytest bench/{name}.py")


@pytest.fixture(scope="session")
def recipes() -> list[Recipe]:
    """The recipes of the matrix, from the baseline to the ways out."""
    return [load_recipe(RECIPES / f"{name}.yaml") for name in ORDER]


@pytest.fixture(scope="session")
def matrix(runner: Runner, recipes: list[Recipe], results_folder: Path, on_gpu: bool) -> Iterator[Matrix]:
    """All results; the tables are written at the end, whatever the verdicts."""
    matrix = Matrix(runner, recipes)
    yield matrix
    results = matrix.results()
    device = results[0].card
    driver = _driver() if on_gpu else None
    write_matrix(results_folder / device, results, provenance_record(device, results[0].provenance, driver))


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())
