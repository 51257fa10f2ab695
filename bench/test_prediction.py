"""What the virtual GPU predicts for the GPU of this machine, and what is measured on it: `pytest bench/ --gpu`.

Rehearsed on a virtual GPU, predicted and found must be equal to the byte, and no table is written.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix_recipes import ORDER
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.cases import Matrix, VirtualRunner
from qlora_lowmem.memory.device import driver_version, properties_of_this_machine, virtual_twin
from qlora_lowmem.memory.profile import provenance_here
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field
from qlora_lowmem.results.kinds.matrix import CaseResult
from qlora_lowmem.results.kinds.prediction import Figure, compare, misses, write_prediction

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest, matrix: Matrix, recipes: list[Recipe], results_folder: Path
) -> Iterator[dict[str, tuple[CaseResult, CaseResult]]]:
    """(predicted, measured) of every recipe; the table is written at the end, whatever the errors."""
    measured = {each.name: matrix[each.name].result() for each in recipes}
    contexts = [each.profile.outside_allocator_bytes for each in measured.values() if each.profile is not None]
    assert contexts, "no recipe has a measured peak"
    properties = properties_of_this_machine()
    twin = virtual_twin(properties, max(contexts))
    server: virtual_gpu.Server = request.getfixturevalue("virtual_server")
    cap = request.config.getoption("vram_cap")
    runs = {
        each.name: VirtualRunner(server, twin).submit(replace_field(each, "max_memory", cap) if cap else each)
        for each in recipes
    }
    found = {name: (run.result(), measured[name]) for name, run in runs.items()}
    yield found
    if provenance_here() == "virtual":
        return
    figures = [figure for name in found for figure in _figures(*found[name])]
    not_compared = {name: _why_not(*found[name]) for name in found if not _figures(*found[name])}
    device = next(each.card for each in measured.values() if each.profile is not None)
    context = (
        f"The virtual card is `{twin.name}` of the table with torch's properties of the {properties.title}, and a "
        f"context of {twin.context_bytes:,} bytes, the most that a measured run held outside the allocator."
    )
    record = provenance_record(device, "measured", driver_version())
    write_prediction(results_folder / device, figures, record, context, not_compared)


def _figures(predicted: CaseResult, measured: CaseResult) -> list[Figure]:
    if predicted.profile is None or measured.profile is None or predicted.fits != measured.fits:
        return []
    return compare(predicted.recipe.name, predicted.profile, measured.profile)


def _why_not(predicted: CaseResult, measured: CaseResult) -> str:
    if predicted.fits != measured.fits:
        return f"predicted to {'fit' if predicted.fits else 'fail'}, measured to {'fit' if measured.fits else 'fail'}"
    return predicted.failure or measured.failure or "it does not fit this card, and nothing larger was measured"


@pytest.mark.parametrize("name", ORDER)
def test_whether_it_fits(pairs: dict[str, tuple[CaseResult, CaseResult]], name: str) -> None:
    predicted, measured = pairs[name]
    assert predicted.failure is None, predicted.failure
    assert measured.failure is None, measured.failure
    assert predicted.fits == measured.fits, _why_not(predicted, measured)


@pytest.mark.parametrize("name", ORDER)
def test_how_much_it_needs(pairs: dict[str, tuple[CaseResult, CaseResult]], name: str) -> None:
    figures = _figures(*pairs[name])
    if not figures:
        pytest.skip(_why_not(*pairs[name]))
    if provenance_here() == "virtual":
        assert [str(figure) for figure in figures if figure.error] == []
        return
    found = misses(figures)
    assert not found, "\n".join(map(str, found))
