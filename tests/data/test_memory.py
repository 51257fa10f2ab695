"""Memory does not grow with the data: measured in processes of their own, on a file and on one ten times its size."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forked_commands import run_forked, start_server
from tiny_chat import word_tokenizer

pytestmark = pytest.mark.slow

MIB = 2**20
WORDS = ["".join(chr(97 + (number * prime) % 26) for prime in (1, 3, 5, 7, 11, 17)) for number in range(26)]


def lines(size: int) -> list[str]:
    """Distinct texts of 2,000 bytes, and each hundredth twice."""
    text = " ".join(WORDS[number % len(WORDS)] for number in range(284))
    texts = [f"{number:>11} {text}" for number in range(size // 2000)]
    return [text for number, text in enumerate(texts) for _ in range(1 + (number % 100 == 0))]


def write_jsonl(path: Path, size: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in lines(size))


def write_parquet(path: Path, size: int) -> None:
    """In row groups of the writer's default, uncompressed, so that one is as large as it looks."""
    pq.write_table(pa.table({"text": lines(size)}), path, compression="none", use_dictionary=False)


def growth(path: Path, size: int, *more: str) -> int:
    """KiB by which reading the file raised the highest resident memory of a process."""
    env = os.environ | {"TMPDIR": str(path.parent), "TOKENIZERS_PARALLELISM": "false"}
    start_server()
    done = run_forked("programs.data_memory", (str(path), *more), env, timeout=300)
    assert done.returncode == 0, done.stderr
    grown, samples, duplicates = map(int, done.stdout.split())
    assert samples == len(lines(size))
    assert duplicates == samples - size // 2000
    path.unlink()
    return grown


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet)])
def test_checking(tmp_path: Path, suffix: str, write: Callable[[Path, int], None]) -> None:
    grown = []
    for size in (10 * MIB, 100 * MIB):
        path = tmp_path / f"{size}.{suffix}"
        write(path, size)
        grown.append(growth(path, size))
    assert grown[1] < grown[0] + 8 * 2**10, grown


def test_tokenising(tmp_path: Path) -> None:
    """Held in lists, the larger file's 1.5 million tokens and labels would be 100 MiB."""
    word_tokenizer(WORDS).save_pretrained(tmp_path / "tokenizer")
    grown = []
    for size in (MIB, 10 * MIB):
        path = tmp_path / f"{size}.jsonl"
        write_jsonl(path, size)
        grown.append(growth(path, size, str(tmp_path / "tokenizer")))
    assert grown[1] < grown[0] + 32 * 2**10, grown
