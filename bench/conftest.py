"""The matrix: every recipe of bench/recipes/ but the demo, run once on the device of this session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_recipes import ORDER, RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.cases import Matrix, Runner
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe_io import load_recipe
from qlora_lowmem.report.matrix import write_matrix


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
