"""What a page cannot be made of is refused, by its file and the place in it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_lowmem.commands.frame import run_command

main = partial(run_command, "report")


def damaged(folder: Path, name: str, change: dict[str, Any]) -> None:
    """Set fields of a file, each by its path with dots."""
    content = json.loads((folder / name).read_text())
    for place, value in change.items():
        *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        found = content
        for part in parents:
            found = found[part]
        found[last] = value
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("waterfall.json", {"cases.0.peak_allocated_bytes": -1}, "cases[0].peak_allocated_bytes: -1"),
        ("waterfall.json", {"cases.0.peak_allocated_bytes": True}, "cases[0].peak_allocated_bytes: True"),
        ("waterfall.json", {"cases.0.floor_bytes": 10**400}, "is not a whole number"),
        ("waterfall.json", {"cases.0": {"idea": "x"}}, "cases[0].peak_allocated_bytes is missing"),
        ("waterfall.json", {"environment": None}, "environment: None is not an object"),
        ("waterfall.json", {"cases.1.floor_bytes": 0}, "cases[1] has a peak or a floor of 0 bytes"),
        ("lean-families.json", {"cases.1.lean_allocated_bytes": 0}, "cases[1] has tokens, a peak or a floor of 0"),
        ("lean-families.json", {"cases.0.tokens": 0}, "cases[0] has tokens, a peak or a floor of 0"),
        ("lean-families.json", {"cases.0.tokens": "1024"}, "cases[0].tokens: '1024' is not a whole number"),
        ("lean-families.json", {"cases.0.floor_bytes": 3 * 2**30}, "optimised_allocated_bytes is not above the floor"),
        ("attribution-plain.json", {"attribution.kinds.loss": 7}, "kinds sum to"),
        ("attribution-plain.json", {"attribution.kinds": [7]}, "attribution.kinds: [7] is not an object"),
        ("attribution-plain.json", {"attribution.timeline.bytes": [[1]]}, "attribution.timeline"),
        ("attribution-plain.json", {"attribution.timeline.events": [3, 2, 1, 0]}, "attribution.timeline.events"),
        ("attribution-plain.json", {"attribution.timeline.phases": [1, 2, 3, 4]}, "attribution.timeline"),
        ("attribution-plain.json", {"attribution.owners.0.kind": "gold"}, "'gold' is not a kind"),
        ("attribution-plain.json", {"attribution.surplus": 1}, "surplus"),
        ("lengths.json", {"cases.1.fits": "yes"}, "cases[1].fits: 'yes' is not true or false"),
        ("lengths.json", {"cases.1.tokens": 0}, "tokens or floor, is 0"),
        ("lengths.json", {"cases.1.floor_bytes": 0}, "tokens or floor, is 0"),
        ("lengths.json", {"cases": []}, "cases is not a list of at least one object"),
        ("phases.json", {"cases.0.phase": "nap"}, "phase: 'nap' is not one of load, resume"),
        ("phases.json", {"cases.1.phase": "load"}, "phase: 'whole' has 'load' twice"),
        ("phases.json", {"cases.0.device_budget_bytes": 0}, "a budget of the phase 'load' is 0"),
        ("phases.json", {"cases.2.floor_bytes": 7}, "floor_bytes: 'whole' has several"),
        ("phases.json", {"cases.2.reserved_bytes": None}, "cases[2].reserved_bytes: None is not a whole number"),
        ("phases.json", {"cases.2.out_of_memory": 7}, "cases[2].out_of_memory: 7 is not a text"),
        ("train.json", {"phases.0.name": "nap"}, "phases: 'nap' is not one of load"),
        ("train.json", {"failure": {"phase": "steady"}}, "failure.message is missing"),
        ("reality.json", {"rows.0.measures": "guessed"}, "'guessed' is not one of allocated"),
        ("reality.json", {"rows.0.measured_bytes": 0}, "is 0 bytes"),
        ("reality.json", {"rows.0.program_bytes": 0.5}, "rows[0].program_bytes: 0.5"),
        ("longest.json", {"cases.0.host_bytes": 1.5}, "cases[0].host_bytes: 1.5"),
        ("longest.json", {"cases.0.floor_bytes": None}, "cases[0].floor_bytes: None"),
        ("prediction.json", {"figures.0.reading": "guessed"}, "'guessed' is not one of"),
        ("prediction.json", {"figures.0.measured_bytes": 0}, "is 0 bytes"),
        ("gate.json", {"cases.0.record.kinds": [1]}, "gate.json"),
        ("gate.json", {"cases.0.record.allocated": "5"}, "cases[0].record.allocated: Expected `int`"),
        ("gate.json", {"cases.1.budget.of": "everything"}, "a budget of 'everything'"),
        ("matrix.json", {"cases.0.phases": 5}, "cases[0].phases: 5 is not a list"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, change: dict[str, Any], message: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(results, name, change)
    output = results / "report.html"
    assert main([str(results), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert str(results / name) in error
    assert message in error
    assert "fault of qlora_lowmem" not in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"cases": NaN}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds no object"),
        (b'{"rows": []}', "is nothing that a page shows"),
        (b'{"cases": 5}', "is nothing that a page shows"),
    ],
)
def test_what_is_no_result_is_refused(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), "--output", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path}: nothing in it that a page shows" in capsys.readouterr().err


def test_places_that_are_not_there_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results), "--output", str(results / "no" / "report.html")]) == 2
    said = capsys.readouterr().err
    assert "--output: " in said
    assert "its folder does not exist; make it" in said
    assert main([str(results), "--output", str(results / "a.html"), "--charts", str(results / "matrix.json")]) == 2
    assert "--charts: " in capsys.readouterr().err
