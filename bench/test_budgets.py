"""Every recipe stays under its budget, or is known not to fit and says what it would need."""

from pathlib import Path

import pytest
import yaml

from matrix_recipes import ORDER
from qlora_lowmem.gate.cases import Matrix
from qlora_lowmem.units import format_bytes, parse_bytes

BUDGETS = yaml.safe_load((Path(__file__).parent / "budgets.yaml").read_text(encoding="utf-8"))
SIX_GB = 6 * 2**30


def test_every_recipe_has_a_budget() -> None:
    assert list(BUDGETS) == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_budget(matrix: Matrix, name: str) -> None:
    result, budget = matrix[name].result(), BUDGETS[name]
    assert result.failure is None, result.failure
    if not budget["fits"]:
        if result.fits and result.profile is not None and result.profile.total_bytes > SIX_GB:
            assert result.profile.peak.device > SIX_GB, "it fits 6 GB now: give it a budget"
        else:
            assert not result.fits, "it fits now: give it a budget"
            assert result.out_of_memory is not None
        return
    assert result.fits, f"does not fit {result.card}: {result.out_of_memory}"
    assert result.profile is not None
    for what, peak in (
        ("allocated", result.profile.peak.allocated),
        ("device", result.profile.peak.device),
    ):
        limit = parse_bytes(budget[what])
        sizes = (format_bytes(each, budget[what]) for each in (peak, peak - limit))
        assert peak <= limit, f"{name}: {what} {' is '.join(sizes)} over its budget of {budget[what]}"
    counted = result.profile.step_launches
    if counted is not None and "launches" in budget:
        over = counted.total - budget["launches"]
        assert over <= 0, f"{name}: {counted.total:,} launches a step is {over:,} over its budget"
