"""The optimised recipe on every 6 GB card of the table: what a person with such a card is told."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.cases import VirtualRunner
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult, write_matrix

SIX_GB_CARDS = [card.name for card in virtual_gpu.all_cards() if card.name.endswith("-6gb")]


@pytest.fixture(scope="module")
def by_card(
    request: pytest.FixtureRequest, on_gpu: bool, results_folder: Path
) -> Iterator[dict[str, "Future[CaseResult]"]]:
    """The optimised recipe's result on each card."""
    if on_gpu:
        pytest.skip("other cards are virtual: pytest bench/test_cards.py without --gpu")
    server = request.getfixturevalue("virtual_server")
    recipe = load_recipe(RECIPES / "optimised.yaml")
    runs = {name: VirtualRunner(server, virtual_gpu.get_card(name)).submit(recipe) for name in SIX_GB_CARDS}
    yield runs
    results = [run.result() for run in runs.values()]
    record = provenance_record("every 6 GB card of the table", "virtual")
    write_matrix(results_folder, results, record, name="six-gb-cards")


def test_there_are_four_kinds_of_6_gb_cards() -> None:
    assert sorted(SIX_GB_CARDS) == ["rtx-2060-6gb", "rtx-3050-6gb", "rtx-3060-laptop-6gb", "rtx-4050-laptop-6gb"]


@pytest.mark.parametrize("name", SIX_GB_CARDS)
def test_optimised_fits(by_card: dict[str, "Future[CaseResult]"], name: str) -> None:
    result, card = by_card[name].result(), virtual_gpu.get_card(name)
    assert result.failure is None, result.failure
    assert result.fits, result.out_of_memory
    assert result.profile is not None
    assert result.profile.peak.device <= card.usable_bytes
