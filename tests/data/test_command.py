"""`train` on each kind of data: what it tells of them, what of that is in `--json`, and what is trained."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from tiny_chat import write_tiny_chat

main = partial(run_command, "train")

CHATS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}. " * (1 + n % 3)}]
    for n in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


def run(model: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, Any], str]:
    """The summary and what was said besides."""
    capsys.readouterr()
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(data), "--json", "-"]
    size = ["--max-steps", "1", "--output-dir", str(data.parent / "out"), "--no-resume", "--no-load-in-4bit"]
    assert main([*flags, *size, *more]) == 0
    printed = capsys.readouterr()
    content: dict[str, Any] = json.loads(printed.out)
    return content, printed.err


def write_chats(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return path


def test_what_is_found_is_told_and_is_in_the_summary(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chats(tmp_path)
    path.write_text(path.read_text() + "\n" + json.dumps({"messages": CHATS[0]}) + "\n")
    short = ("--max-seq-length", "24", "--num-epochs", "1", "--max-steps", "none")
    content, said = run(model, path, capsys, *short)
    data = content["data"]
    assert (data["samples"], data["blank_lines"], data["duplicates"]) == (13, 1, {"count": 1, "first": [14, 1]})
    tokens = data["tokens"]
    assert 0 < tokens["truncated_samples"] < 13
    assert tokens["samples"] == tokens["of_samples"] == 13
    assert f"{tokens['truncated_samples']} samples are longer than max_seq_length 24" in said
    assert "13 samples of messages in" in said
    assert "1 of 13 samples repeat an earlier one" in said
    assert not (tmp_path / "out" / "tokenised").exists(), "a complete run needs its tokens no more"
    dry, _ = run(model, path, capsys, *short, "--dry-run")
    assert dry["data"] == data


def test_a_dry_run_prints_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chats(tmp_path)
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(path), "--dry-run"]
    assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "# data: 12 samples of messages in" in printed
    assert "of them with a loss, in 12 samples; the longest has" in printed
    assert not (tmp_path / "out").exists()


def test_lines_and_rows_of_the_same_samples_train_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, _ = run(model, write_chats(tmp_path), capsys)
    (tmp_path / "rows").mkdir()
    table = tmp_path / "rows" / "data.parquet"
    pq.write_table(pa.table({"id": list(range(12)), "messages": CHATS}), table)
    rows, said = run(model, table, capsys)
    assert rows["losses"] == lines["losses"]
    assert "columns that are not read: id" in said
    assert rows["recipe_hash"] != lines["recipe_hash"]


def test_packed_samples_have_the_loss_that_they_have_apart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in one row, none seeing another: the mean over all their tokens is that of a padded batch."""
    path = write_chats(tmp_path)
    size = ["--max-seq-length", "2048", "--num-epochs", "1", "--max-steps", "none"]
    packed, _ = run(model, path, capsys, *size, "--batch-size", "1", "--packing")
    apart, _ = run(model, path, capsys, *size, "--batch-size", "12", "--output-dir", str(tmp_path / "apart"))
    assert (packed["steps"], apart["steps"]) == (1, 1)
    assert packed["losses"] == pytest.approx(apart["losses"], rel=1e-5)
