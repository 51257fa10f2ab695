"""Published fine-tuning peaks: their recipes, the bytes that are explained, and what counts as agreement."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from reality.comparison import Comparison
from reality.explained import explained_bytes
from reality.rows import FACTORY, FITCHECK, FMS, FMS_LATER, PEFT, UNSLOTH, PublishedPeak, published_peaks
from reality.table import SOURCES, write_reality

ROWS = published_peaks()
MIB = 2**20


def _first(source: str, part: str = "") -> PublishedPeak:
    return next(row for row in ROWS if row.source == source and part in row.run)


def _plan(allocated: int, reserved: int, device: int) -> MemoryProfile:
    phases = {"load": Peak(1, 1, 1), "steady": Peak(allocated, reserved, device)}
    return MemoryProfile("a-card", "virtual", 2**40, 0, phases)


@pytest.mark.parametrize("row", {row.key: row for row in ROWS}.values(), ids=lambda row: f"{row.source}: {row.run}")
def test_a_row_is_a_recipe(row: PublishedPeak) -> None:
    recipe = row.recipe
    assert recipe.base.weights == "random"
    assert recipe.memory.loss == "full"
    assert row.source in SOURCES
    assert {"vocab_size", "hidden_size", "num_hidden_layers", "model_type"} <= set(row.architecture)


def test_logits_that_the_loop_holds() -> None:
    nf4, plain = _first(FITCHECK, "SmolLM2-1.7B, QLoRA"), _first(FITCHECK, "SmolLM2-1.7B, LoRA")
    assert explained_bytes(nf4) == 4 * 1024 * 49152 * 4
    assert explained_bytes(plain) == 4 * 1024 * 49152 * 2


def test_what_else_is_explained() -> None:
    assert explained_bytes(_first(FMS)) == 0
    assert explained_bytes(_first(FACTORY)) == 0
    assert explained_bytes(_first(FMS_LATER, "batch 8")) == 8 * 4096 * 32000 * 2
    assert explained_bytes(_first(UNSLOTH)) == 2 * 128256 * 4096 * 2
    tokens = 4 * 692
    assert explained_bytes(_first(PEFT)) == tokens * 128256 * 2 + 2 * 28 * tokens * 8 * 128 * 2


def test_the_two_publications_of_a_run_differ_by_what_is_explained() -> None:
    """Within 0.3 %: that is what the explanation of the later ones rests on."""
    earlier = {row.key: row for row in ROWS if row.source == FMS and row.measures == "allocated"}
    later = [row for row in ROWS if row.source == FMS_LATER]
    assert len(later) == len(earlier) == 4
    for row in later:
        grown = row.measured_bytes - earlier[row.key].measured_bytes
        assert grown == pytest.approx(explained_bytes(row), rel=0.003)


def test_a_figure_is_compared_with_its_own_kind() -> None:
    row, plan = _first(FMS), _plan(100, 200, 300)
    figures = {kind: Comparison(replace(row, measures=kind), plan).plan_bytes for kind in ("allocated", "reserved")}
    assert figures == {"allocated": 100, "reserved": 200}
    assert Comparison(replace(row, measures="device"), plan).plan_bytes == 300
    assert Comparison(replace(row, measures="limit"), plan).plan_bytes == 300


def test_difference_left_and_program() -> None:
    row = _first(FITCHECK, "SmolLM2-1.7B, LoRA")
    held = explained_bytes(row)
    program = {"loaded": 40, "allocated": row.measured_bytes // 2, "reserved": 7}
    found = Comparison(row, _plan(row.measured_bytes - held, 0, 0), program)
    assert found.difference == pytest.approx(-held / row.measured_bytes)
    assert found.left == pytest.approx(0)
    assert found.program_difference == pytest.approx(-0.5)
    assert row.loaded_bytes is not None
    grown = (program["allocated"] - 40) / (row.measured_bytes - row.loaded_bytes) - 1
    assert found.program_growth_difference == pytest.approx(grown)
    assert found.agrees is None


@pytest.mark.parametrize(
    ("device", "agrees"),
    [
        (5_500_000_000, True),
        (5_499_999_999, False),
        (int(6.5 * 2**30), True),
        (int(6.5 * 2**30) + 1, False),
    ],
)
def test_a_rounded_figure_agrees_within_its_rounding(device: int, agrees: bool) -> None:
    row = _first(FACTORY)
    assert row.measured_bytes == 6_000_000_000
    assert Comparison(row, _plan(0, 0, device)).agrees is agrees


@pytest.mark.parametrize(("device", "agrees"), [(40_000_000_000, False), (40_000_000_001, True)])
def test_an_out_of_memory_agrees_beyond_the_card(device: int, agrees: bool) -> None:
    row = next(row for row in ROWS if row.measures == "out of memory")
    found = Comparison(row, _plan(0, 0, device))
    assert (found.agrees, found.difference, found.left) == (agrees, None, None)


def test_the_table(tmp_path: Path) -> None:
    program = {"loaded": 0, "allocated": 10, "reserved": 10}
    found = [
        Comparison(row, _plan(10 * MIB, 20 * MIB, 30 * MIB), program if row.source in (FITCHECK, PEFT) else None)
        for row in ROWS
    ]
    write_reality(tmp_path, found, provenance_record("the card of each row", "virtual"))
    text = (tmp_path / "reality.md").read_text()
    assert text.startswith("# Published fine-tuning peaks and the plan's\n")
    assert all(f"## {source}\n" in text for source in SOURCES)
    rows = json.loads((tmp_path / "reality.json").read_text())["rows"]
    assert len(rows) == len(ROWS)
    assert rows[0]["plan_bytes"] == 10 * MIB
