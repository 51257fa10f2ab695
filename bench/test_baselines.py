"""Every recipe needs what it needed when its baseline was recorded, to the byte on a virtual card."""

from collections.abc import Callable

import pytest

from matrix_recipes import ORDER
from qlora_lowmem.gate.cases import Matrix, Runner, recipe_record
from qlora_lowmem.gate.session import GateSession
from qlora_lowmem.memory.profile import MemoryProfile


@pytest.mark.parametrize("name", ORDER)
def test_baseline(
    matrix: Matrix,
    runner: Runner,
    profile_of: Callable[[str], MemoryProfile],
    vram_gate: GateSession,
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    profile_of(name)
    result = matrix[name].result()
    vram_gate.check(request.node, name, recipe_record(result), lambda snapshot: runner.attribute(result, snapshot))


def test_no_baseline_without_its_recipe(matrix: Matrix, vram_gate: GateSession, request: pytest.FixtureRequest) -> None:
    vram_gate.check_complete(request.node, matrix[ORDER[0]].result().card, ORDER)
