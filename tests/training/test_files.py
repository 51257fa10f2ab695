"""A disk that takes nothing is told as such, with the path, and what was there stays."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from qlora_lowmem import files
from qlora_lowmem.data import check_data
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run.summary import write_model_card
from qlora_lowmem.run_folder.resumption import checkpoint_to_resume, held_folder
from qlora_lowmem.tokens import dataset
from qlora_lowmem.training.progress import LogFile
from tiny_chat import tiny_tokenizer

Make = Callable[..., Recipe]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused(path: Path) -> Any:
    return pytest.raises(UsageError, match=rf"cannot be written to '{path}.*' \(No space left on device\)\. Make room")


def test_the_recipe_and_the_lock(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("run")
    output_dir = Path(recipe.run.output_dir)
    with held_folder(output_dir):
        checkpoint_to_resume(recipe)
        before = (output_dir / "recipe.json").read_bytes()
        monkeypatch.setattr(files, "flush", full)
        with refused(output_dir / "recipe.json"):
            checkpoint_to_resume(recipe)
    assert (output_dir / "recipe.json").read_bytes() == before
    assert not list(output_dir.glob(".recipe.json*"))
    monkeypatch.setattr("qlora_lowmem.run_folder.resumption.FileLock.acquire", full)
    with pytest.raises(UsageError, match=r"cannot be written \(No space left"), held_folder(output_dir):
        pass


def test_the_model_card_is_whole_or_as_it_was(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("run", max_steps=1)
    outcome = execute(inputs_of(recipe), output_dir=Path(recipe.run.output_dir))
    write_model_card(tmp_path, inputs_of(recipe), outcome, "cpu")
    before = (tmp_path / "README.md").read_bytes()
    monkeypatch.setattr(files, "flush", full)
    with refused(tmp_path / "README.md"):
        write_model_card(tmp_path, inputs_of(tiny_recipe("other", lora_r=4)), outcome, "cpu")
    assert (tmp_path / "README.md").read_bytes() == before


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "filelock.FileLock.acquire"])
def test_the_tokens_folder(
    tiny_recipe: Make, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    samples, tokenizer, recipe = check_data(str(conversations)), tiny_tokenizer(), tiny_recipe("run")
    monkeypatch.setattr(call, full)
    with refused(tmp_path):
        dataset.training_data(recipe, samples, tokenizer, tmp_path)


def test_packed_samples_and_lists_of_those_held_out(
    tiny_recipe: Make, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("run", packing=True)
    samples, tokenizer = check_data(str(conversations)), tiny_tokenizer()
    data = dataset.training_data(recipe, samples, tokenizer, tmp_path)
    assert dataset.folder_of(data.dataset).is_relative_to(tmp_path / "tokenised")
    monkeypatch.setattr(Dataset, "train_test_split", full)
    with refused(tmp_path / "tokenised"):
        dataset.hold_out(data.dataset, 0.5, 1)
    monkeypatch.setattr(dataset, "pack_dataset", full)
    with refused(tmp_path / "tokenised"):
        dataset.training_data(recipe, samples, tokenizer, tmp_path)


def test_the_log_that_has_to_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 3}\n')
    monkeypatch.setattr("os.truncate", full)
    with refused(tmp_path / "log.jsonl"):
        LogFile(tmp_path, print).on_train_begin(None, SimpleNamespace(global_step=2, log_history=[]), None)
