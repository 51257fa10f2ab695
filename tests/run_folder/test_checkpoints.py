"""Checkpoints are there whole or not at all."""

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qlora_lowmem.run_folder.checkpoints import CheckpointStore, NotSavedError, corruption, newest_complete, step_of


def write(step: int, content: bytes = b"weights") -> Callable[..., Any]:
    def made(staging: Path) -> None:
        folder = staging / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(content)
        (folder / "training_args.bin").write_bytes(b"a pickle")

    return made


def steps(folder: Path) -> list[int]:
    return sorted(step_of(path) for path in folder.glob("checkpoint-*"))


def test_saved_whole_without_pickled_arguments_and_the_newest_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 10):
        store.save(step, write(step))
    assert steps(tmp_path) == [2, 10]
    assert sorted(path.name for path in (tmp_path / "checkpoint-10").iterdir()) == ["manifest.json", "weights"]
    assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-10"
    assert not store.staging.exists()


def test_a_damaged_one_is_passed_over_aloud_and_does_not_count_as_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, write(step))
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"torn")
    found = newest_complete(tmp_path)
    assert found.checkpoint == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is damaged (weights has 4 bytes, and 7 were written)" in found.notes[0]
    (tmp_path / "checkpoint-2" / "weights").unlink()
    assert newest_complete(tmp_path).checkpoint is None
    store.save(4, write(4))
    assert steps(tmp_path) == [4]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, write(1))
    (tmp_path / "checkpoint-1" / "weights").write_bytes(b"torn")
    store.save(1, write(1, b"again"))
    assert corruption(tmp_path / "checkpoint-1") is None
    assert (tmp_path / "checkpoint-1" / "weights").read_bytes() == b"again"


def full_disk(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def limited(save: Callable[..., Any]) -> Callable[..., Any]:
    """What a library says when a file cannot grow."""

    def write(staging: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            save({"a": torch.zeros(10_000)}, str(staging / "file"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return write


def save_tokenizer(_: dict[str, torch.Tensor], file: str) -> None:
    words = {f"word{number}": number for number in range(1000)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(file)


@pytest.mark.parametrize(
    ("write_badly", "cause"),
    [
        (full_disk, "No space left on device"),
        (limited(save_file), "File too large"),
        (limited(save_tokenizer), "File too large"),
        (limited(torch.save), "a file could not be written to its end"),
    ],
)
def test_a_full_disk_leaves_the_one_before(tmp_path: Path, write_badly: Callable[..., Any], cause: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, write(1))
    with pytest.raises(NotSavedError, match=r"checkpoint-1 is whole\. Make room") as caught:
        store.save(2, write_badly)
    assert cause in str(caught.value)
    assert caught.value.exit_code == 2
    assert steps(tmp_path) == [1]
    assert corruption(tmp_path / "checkpoint-1") is None
    assert not store.staging.exists()
    with pytest.raises(NotSavedError, match="the adapter could not be written"):
        store.save_final(write_badly)


def test_another_failure_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        CheckpointStore(tmp_path, keep=2).save(1, fail)
    assert steps(tmp_path) == []
