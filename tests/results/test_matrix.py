"""The comparison table: a row a recipe, in three formats, with its provenance."""

from pathlib import Path

from helpers import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult, write_matrix


def test_results_go_where_asked(tmp_path: Path) -> None:
    """A table for every device, in the three formats, from one small case."""
    recipe = load_recipe(RECIPES / "optimised.yaml")
    peaks = MemoryProfile("some-card", "virtual", 6 * 2**30, 0, {"steady": Peak(2**30, 2 * 2**30, 3 * 2**30)})
    fits = CaseResult(recipe, "some-card", "virtual", fits=True, profile=peaks)
    failed = CaseResult(recipe, "some-card", "virtual", fits=False, profile=None, failure="line one\nValueError: x")
    write_matrix(tmp_path, [fits, failed], provenance_record("some-card", "virtual"))
    text = (tmp_path / "matrix.md").read_text()
    assert "**virtual**" in text
    cells = [cell.strip() for cell in text.split("|")]
    assert {"1.000", "2.000", "3.000", "fits"} <= set(cells)
    assert "failed: ValueError: x" in text
    assert (tmp_path / "matrix.csv").read_text().count("\n") == 3
    assert '"peak_allocated_bytes": 1073741824' in (tmp_path / "matrix.json").read_text()
