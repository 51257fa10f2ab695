"""Predicted beside measured: all of it but the measurement."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.kinds.prediction import LIMITS, WHOLE_RUN, Figure, compare, misses, write_prediction
from results.profiles import GIB, MEASURED, predicted


def test_every_phase_and_reading_is_compared() -> None:
    figures = compare("r", predicted(allocated=0.5), MEASURED)
    assert [(figure.phase, figure.reading) for figure in figures] == [
        (phase, reading)
        for phase in ("load", "first step", "steady", WHOLE_RUN)
        for reading in ("allocated", "reserved", "device")
    ]
    first_step = figures[3]
    assert (first_step.predicted_bytes, first_step.measured_bytes, first_step.error) == (9 * GIB // 2, 3 * GIB, 0.5)


def test_the_whole_run_is_the_highest_of_the_phases() -> None:
    whole = {f.reading: f.measured_bytes for f in compare("r", predicted(), MEASURED) if f.phase == WHOLE_RUN}
    assert whole == {"allocated": 3 * GIB, "reserved": 4 * GIB, "device": 4 * GIB + GIB // 2}


def test_a_phase_that_one_run_lacks_is_left_out() -> None:
    short = replace(predicted(), phases=dict(list(predicted().phases.items())[:2]))
    assert {figure.phase for figure in compare("r", short, MEASURED)} == {"load", "first step", WHOLE_RUN}


def test_profiles_must_be_comparable() -> None:
    with pytest.raises(ValueError, match="must be virtual"):
        compare("r", MEASURED, MEASURED)
    with pytest.raises(ValueError, match="no phase in common"):
        compare("r", replace(predicted(), phases=()), MEASURED)


@pytest.mark.parametrize(
    ("reading", "limit", "just_over"), [("allocated", 10_000_000, 10_000_001), ("reserved", 30_000_000, 30_000_001)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_misses_begin_one_byte_over_the_limit(reading: str, limit: int, just_over: int, sign: int) -> None:
    def figure(off_by: int) -> Figure:
        return Figure("r", WHOLE_RUN, reading, 10**9 + sign * off_by, 10**9)

    assert misses([figure(limit)]) == []
    (miss,) = misses([figure(just_over)])
    assert miss.limit == LIMITS[reading]
    assert f"r: {reading} over the whole run predicted" in str(miss)


def test_phases_and_the_device_have_no_limit() -> None:
    assert misses([Figure("r", "load", "allocated", 2, 1), Figure("r", WHOLE_RUN, "device", 2, 1)]) == []


def test_no_table_holds_a_prediction_against_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="these are virtual"):
        write_prediction(tmp_path, [], provenance_record(MEASURED.device, "virtual"), "", {})
    assert not list(tmp_path.iterdir())


def test_the_table_says_what_each_figure_is(tmp_path: Path) -> None:
    figures = compare("optimised", predicted(allocated=0.02), MEASURED)
    record = provenance_record(MEASURED.device, "measured", "580.1")
    write_prediction(tmp_path, figures, record, "The virtual card is a twin.", {"baseline": "it does not fit"})
    markdown = (tmp_path / "prediction.md").read_text()
    assert "allocated: median 2.00%, worst 2.00%, limit 1 %" in markdown
    assert "- `baseline`: it does not fit" in markdown
    assert "The virtual card is a twin." in markdown
    assert "driver: 580.1" in markdown
    line = next(line for line in markdown.splitlines() if line.startswith("| optimised") and WHOLE_RUN in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:5] == ["3.060", "3.000", "+2.00%"]
    with (tmp_path / "prediction.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(figures)
    assert {(row["predicted_provenance"], row["measured_provenance"]) for row in rows} == {("virtual", "measured")}
    content = json.loads((tmp_path / "prediction.json").read_text())
    assert content["figures"][0]["measured_bytes"] == GIB
    assert content["not_compared"] == {"baseline": "it does not fit"}
