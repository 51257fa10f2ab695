"""The section of lean on several models: every figure that of its file, the models together by length."""

import json
from pathlib import Path

import pytest

from helpers import ROOT
from qlora_lowmem.results.kinds import Section
from qlora_lowmem.results.page import sections_of

FAMILIES = ROOT / "results" / "lean-families.json"


@pytest.fixture(scope="module")
def section() -> Section:
    (found,) = sections_of([FAMILIES]).sections
    return found


def test_every_pair_is_a_row(section: Section) -> None:
    cases = sorted(json.loads(FAMILIES.read_text())["cases"], key=lambda case: case["tokens"])
    (table,) = section.charts[0].tables
    assert [row[0].text for row in table.rows] == [case["model"] for case in cases]
    names = ("tokens", "optimised_allocated_bytes", "lean_allocated_bytes")
    figures = [[case[name] for name in names] for case in cases]
    assert [[cell.value for cell in row[1:4]] for row in table.rows] == figures
    for row, case in zip(table.rows, cases, strict=True):
        optimised, lean, floor = (case[f"{name}_bytes"] for name in ("optimised_allocated", "lean_allocated", "floor"))
        assert [cell.value for cell in row[4:]] == [
            optimised - lean,
            floor,
            pytest.approx(lean / floor, rel=1e-5),
            pytest.approx((optimised - lean) / (optimised - floor), rel=1e-5),
        ]


def test_what_lean_saves_is_said_by_length(section: Section) -> None:
    """The least and the largest share of each length; the longest is a highlight."""
    (table,) = section.charts[0].tables
    ranges = {}
    for tokens in (1024, 4096):
        shares = [float(row[7].value or 0) for row in table.rows if row[1].value == tokens]
        ranges[tokens] = f"{min(shares):.0%} to {max(shares):.0%}"
        assert f"{ranges[tokens]} at {tokens:,} tokens" in section.charts[0].summary
    ((figure, words),) = section.highlights
    assert figure == ranges[4096]
    assert "at 4,096 tokens" in words


def test_one_share_is_no_range(written: Path) -> None:
    (section,) = sections_of([written / "lean-families.json"]).sections
    assert section.highlights[0][0] == "75%"
    assert section.charts[0].summary.endswith("lean saves 50% at 1,024 tokens, 75% at 4,096 tokens.")
