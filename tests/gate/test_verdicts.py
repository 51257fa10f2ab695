"""Every verdict, at its limit and one byte beyond."""

import dataclasses

import pytest

from gate.examples import KEY, grown, record
from qlora_lowmem.gate.records import difference
from qlora_lowmem.gate.verdicts import EXACT, MEASURED, Gate, Tolerance, compare, missing
from qlora_lowmem.units import MIB


@pytest.mark.parametrize(("now", "verdict"), [(1000, "PASS"), (1001, "REGRESSED"), (999, "IMPROVED"), (0, "IMPROVED")])
def test_exact_on_a_virtual_card(now: int, verdict: str) -> None:
    assert compare("case", record(1000), record(now), EXACT).name == verdict


@pytest.mark.parametrize(
    ("tolerance", "now", "verdict"),
    [
        (Tolerance(absolute=10), 1010, "PASS"),
        (Tolerance(absolute=10), 1011, "REGRESSED"),
        (Tolerance(absolute=10), 990, "PASS"),
        (Tolerance(absolute=10), 989, "IMPROVED"),
        (Tolerance(relative=0.05), 1050, "PASS"),
        (Tolerance(relative=0.05), 1051, "REGRESSED"),
        (Tolerance(absolute=10, relative=0.05), 1050, "PASS"),
    ],
)
def test_tolerance(tolerance: Tolerance, now: int, verdict: str) -> None:
    assert compare("case", record(1000), record(now), Gate(tolerance, Tolerance(10**9))).name == verdict


def test_measured_figures_have_some_room() -> None:
    assert compare("case", record(1000), record(1000 + 2 * MIB), MEASURED).name == "PASS"
    assert compare("case", record(1000), record(1001 + 2 * MIB), MEASURED).name == "REGRESSED"


def test_reserved_has_a_looser_gate() -> None:
    within = record(reserved=2048 + 64 * MIB)
    beyond = record(reserved=2049 + 64 * MIB)
    assert compare("case", record(), within, EXACT).name == "PASS"
    verdict = compare("case", record(), beyond, EXACT)
    assert verdict.name == "REGRESSED"
    assert "reserved grew by 64.0 MiB; allowed are 64.0 MiB" in verdict.render()


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (100, 100, "PASS"),
        (100, 101, "REGRESSED"),
        (100, 99, "IMPROVED"),
        (None, 100, "PASS"),  # recorded before they were counted
        (100, None, "PASS"),  # on a GPU
    ],
)
def test_launches_are_compared_where_both_have_counted(before: int | None, now: int | None, verdict: str) -> None:
    found = compare("case", record(launches=before), record(launches=now), EXACT)
    assert found.name == verdict
    if verdict != "PASS":
        assert f"launches {now}, baseline 100" in found.render()


def test_less_memory_from_more_launches_is_a_regression_that_says_both() -> None:
    verdict = compare("case", record(1000, launches=100), record(900, launches=2500), EXACT)
    assert verdict.name == "REGRESSED"
    assert "launches 2,500, baseline 100, +2,400" in verdict.render()
    assert "difference -100 B" in verdict.render()


def test_more_memory_is_told_first() -> None:
    verdict = compare("case", record(1000, launches=100), record(1001, launches=99), EXACT)
    assert verdict.name == "REGRESSED"
    assert "launches" not in verdict.render()


def test_new_and_missing_say_what_to_do() -> None:
    new = compare("case", None, record(), EXACT)
    assert (new.name, new.fails) == ("NEW", False)
    assert "--vram-record=case" in new.render()
    gone = missing("case", record())
    assert gone.fails
    assert "no case of that name ran" in gone.render()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KEY)])
def test_not_comparable_names_the_key(field: str) -> None:
    verdict = compare("case", record(), record(key=dataclasses.replace(KEY, **{field: "other"})), EXACT)
    assert verdict.name == "NOT COMPARABLE"
    assert verdict.fails
    assert f"{field}: {getattr(KEY, field)} in the baseline, other now" in verdict.render()
    assert "--vram-record" in verdict.render()


def test_across_versions_compares_versions_and_nothing_else() -> None:
    newer = dataclasses.replace(KEY, transformers="5.17.0")
    grown = record(25000, key=newer)
    verdict = compare("case", record(), grown, EXACT, across_versions=True)
    assert verdict.name == "REGRESSED"
    assert "transformers 5.23.0 -> 5.17.0" in verdict.render()
    other = record(key=dataclasses.replace(newer, recipe="0"))
    assert compare("case", record(), other, EXACT, across_versions=True).name == "NOT COMPARABLE"


def test_regression_says_what_grew() -> None:
    now = record(
        1600,
        kinds={"weights_other": 500, "activations_mlp": 600, "loss": 500},
        modules={"layers.0": 500, "layers.1": 500, "layers.2": 600},
        lines={"activations_mlp | model.py:15 forward": 600, "loss | train.py:3 step": 500},
    )
    verdict = compare("case", record(), now, EXACT)
    assert verdict.name == "REGRESSED"
    assert grown(record(), now) == {"loss": 500, "activations_mlp": 100}
    text = verdict.render()
    for said in ("+600 B", "loss and logits", "layers.2", "new", "train.py step", "packages: the same versions"):
        assert said in text
    assert "weights" not in text  # what did not change is not shown


def test_a_line_that_moved_is_not_a_change() -> None:
    moved = record(lines={"activations_mlp | model.py:99 forward": 500})
    assert difference(record(), moved).lines == ()


def test_not_attributed() -> None:
    bare = record(2000, kinds={}, modules={}, lines={})
    verdict = compare("case", record(), bare, EXACT)
    assert verdict.name == "REGRESSED"
    assert difference(record(), bare).kinds == ()
    assert "difference +1000 B" in verdict.render()
