"""The comparison table: a row a recipe, in three formats, with its provenance."""

import json
from pathlib import Path

from helpers import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.results.kinds.matrix import CaseResult, readme_block, write_matrix
from qlora_lowmem.units import GIB
from qlora_lowmem.virtual_gpu import Launches


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
    assert "launches" not in text, "nobody counted"


def test_launches_of_a_step_stand_beside_its_bytes_and_in_older_files_nowhere(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "optimised.yaml")
    launches = {"first step": Launches(900), "steady": Launches(700, 40, 1)}
    peaks = MemoryProfile("some-card", "virtual", 6 * GIB, 0, {"steady": Peak(GIB, 2 * GIB, 3 * GIB)}, launches)
    case = CaseResult(recipe, "some-card", "virtual", fits=True, profile=peaks)
    write_matrix(tmp_path, [case], provenance_record("some-card", "virtual"))
    text = (tmp_path / "matrix.md").read_text()
    assert "launches a step" in text
    assert "741" in {cell.strip() for cell in text.split("|")}
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert content["cases"][0]["launches"] == content["cases"][0]["phases"][0]["launches"] == 741
    assert "launches a step" in readme_block(content)
    del content["cases"][0]["launches"], content["cases"][0]["phases"][0]["launches"]
    assert "launches" not in readme_block(content)
