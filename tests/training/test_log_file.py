"""The log that a program follows: every step once, no half line."""

import json
from pathlib import Path

import pytest

from qlora_lowmem.training.log_file import keep_until


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


def test_no_log_is_no_fault(tmp_path: Path) -> None:
    keep_until(tmp_path / "log.jsonl", 2)
    assert not (tmp_path / "log.jsonl").exists()
