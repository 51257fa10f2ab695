"""The log that a program follows: every step once, no half line."""

import json
from pathlib import Path

import pytest

from qlora_lowmem.training.progress import keep_until


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (lines(1, 2, 3), lines(1, 2)),
        (lines(1, 2), lines(1, 2)),
        (lines(1) + '{"step": 2', lines(1)),
        (lines(1) + "\0\0\0\n", lines(1)),
        (lines(1) + '{"step": 2}', lines(1)),
        (lines(3), ""),
        ("", ""),
    ],
)
def test_the_log_is_cut_to_the_step_that_a_run_goes_on_from(tmp_path: Path, content: str, kept: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    keep_until(path, 2)
    assert path.read_text() == kept


def test_an_evaluation_that_comes_again_goes_from_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    evaluation = json.dumps({"step": 2, "eval_loss": 1.0}) + "\n"
    for evaluated, kept in ((True, lines(1, 2) + evaluation), (False, lines(1, 2))):
        path.write_text(lines(1, 2) + evaluation + lines(3))
        keep_until(path, 2, evaluated=evaluated)
        assert path.read_text() == kept


def test_no_log_is_no_fault(tmp_path: Path) -> None:
    keep_until(tmp_path / "log.jsonl", 2)
    assert not (tmp_path / "log.jsonl").exists()
