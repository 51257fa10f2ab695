"""Weights come from safetensors and states from plain data: a pickle that would run code is refused, and runs none."""

import json
import os
import pathlib
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.models.trusted import check_adapter, check_checkpoint
from qlora_lowmem.run_folder.checkpoints import MANIFEST, seal
from tiny_chat import write_tiny_chat

main = partial(run_command, "train")


class Hostile:
    """An object whose unpickling makes a file."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._proof}",)


class Reaching:
    """An object whose unpickling takes an attribute of a class that may be named."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[type, str]]:
        return getattr, (torch.Size, "__subclasses__")


def as_torch(value: object, file: Path) -> None:
    torch.save(value, file)


def as_old_torch(value: object, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


def as_pickle(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with what the trainer writes, its values made up."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    as_torch(optimizer.state_dict(), folder / "optimizer.pt")
    as_torch(schedule.state_dict(), folder / "scheduler.pt")
    as_torch({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    return folder


def test_a_checkpoint_of_the_trainer_is_taken(checkpoint: Path) -> None:
    check_checkpoint(checkpoint)


@pytest.mark.parametrize("write", [as_torch, as_old_torch, as_pickle])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "scaler.pt"])
def test_a_state_that_would_run_code_is_refused(
    checkpoint: Path, tmp_path: Path, write: Callable[[object, Path], None], name: str
) -> None:
    write({"state": Hostile(tmp_path / "ran")}, checkpoint / name)
    with pytest.raises(UsageError, match=f"{name}' is no plain state"):
        check_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_sharded_checkpoint_is_taken_and_its_index_may_not_run_code(tmp_path: Path) -> None:
    """Written by PyTorch itself, as FSDP2 does with SHARDED_STATE_DICT."""
    shards = tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0"
    weight = torch.ones(4, dtype=torch.bfloat16)
    dcp.save({"model": {"weight": weight}, "step": 3}, checkpoint_id=shards, no_dist=True)
    check_checkpoint(tmp_path / "checkpoint-1")
    as_pickle({"state": Hostile(tmp_path / "ran")}, shards / ".metadata")
    with pytest.raises(UsageError, match=r"\.metadata' is no plain state: it would import posix\.system"):
        check_checkpoint(tmp_path / "checkpoint-1")
    as_pickle(Reaching(), shards / ".metadata")
    with pytest.raises(UsageError, match=r"it would take __subclasses__ of <class 'torch\.Size'>"):
        check_checkpoint(tmp_path / "checkpoint-1")
    (shards / ".metadata").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be read"):
        check_checkpoint(tmp_path / "checkpoint-1")
    assert not (tmp_path / "ran").exists()


def test_a_sharded_checkpoint_of_python_3_13_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index names the class of paths by the module that it moved to there."""
    monkeypatch.setitem(sys.modules, "pathlib._local", pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", "pathlib._local")
    shards = tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0"
    dcp.save({"model": {"weight": torch.ones(4)}}, checkpoint_id=shards, no_dist=True)
    assert b"pathlib._local" in (shards / ".metadata").read_bytes()
    check_checkpoint(tmp_path / "checkpoint-1")


def test_a_pickled_adapter_is_refused(checkpoint: Path) -> None:
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    for check in (check_checkpoint, check_adapter):
        with pytest.raises(UsageError, match=r"as a pickle \(adapter_model\.bin\)"):
            check(checkpoint)


def test_a_link_for_a_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").symlink_to(checkpoint)
    with pytest.raises(UsageError, match="is a link to"):
        check_checkpoint(tmp_path / "checkpoint-2")


def test_a_model_folder_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    as_torch({"weight": Hostile(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pytorch_model\.bin: a pickle, which can run code"):
        resolve_model(str(tmp_path), "pretrained")
    assert not (tmp_path / "ran").exists()


def tiny(folder: Path, *more: str) -> list[str]:
    """The demo's recipe on a tiny model."""
    model = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder / "model"), "--quiet"]
    return [*model, "--output-dir", str(folder / "out"), "--save-steps", "1", *more]


def test_a_run_does_not_go_on_from_a_checkpoint_that_would_run_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sealed as the trainer seals, so that nothing but its content tells it from a good one."""
    write_tiny_chat(tmp_path / "model")
    assert main(tiny(tmp_path, "--max-steps", "2", "--num-epochs", "1")) == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    as_torch({"state": Hostile(tmp_path / "ran"), "param_groups": []}, checkpoint / "optimizer.pt")
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    (tmp_path / "out" / "adapter_model.safetensors").unlink()  # a run that was cut off as it ended
    capsys.readouterr()
    assert main(tiny(tmp_path, "--max-steps", "2", "--num-epochs", "1")) == 2
    printed = capsys.readouterr().err
    assert "optimizer.pt' is no plain state: it would import posix.system" in printed
    assert printed.count("error: ") == 1
    assert not (tmp_path / "ran").exists()


REMOTE = "from transformers import LlamaConfig\nopen({proof!r}, 'w')\nclass Own(LlamaConfig):\n    model_type = 'own'\n"


def test_code_of_a_model_folder_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither for the model nor for its tokenizer, and nobody is asked on standard input."""
    folder = write_tiny_chat(tmp_path / "model")
    (folder / "own.py").write_text(REMOTE.format(proof=str(tmp_path / "ran")))
    for name, entry in (("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
                        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]})):  # fmt: skip
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": entry}))
    assert main(tiny(tmp_path, "--max-steps", "1")) == 0
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "own"}))
    capsys.readouterr()
    assert main(tiny(tmp_path, "--max-steps", "1", "--output-dir", str(tmp_path / "other"))) == 2
    assert "base.trust_remote_code: false" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("folder", ["/tmp/elsewhere", "../elsewhere", "a/../../elsewhere", "..", "~/elsewhere"])
def test_a_recipe_writes_below_the_working_directory(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "from-a-stranger.yaml"
    recipe.write_text(f"run:\n  output_dir: {folder}\n")
    assert main(["--config", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "leads out of the working directory" in said
    assert "--output-dir" in said


def test_what_a_person_types_may_lead_anywhere(tmp_path: Path) -> None:
    from qlora_lowmem.recipe.io import load_recipe

    (tmp_path / "r.yaml").write_text("run:\n  output_dir: ../elsewhere\n")
    typed = str(tmp_path / "x" / ".." / "y")
    assert load_recipe(tmp_path / "r.yaml", {"output_dir": typed}).run.output_dir == typed
    (tmp_path / "r.yaml").write_text("run:\n  output_dir: a/../{name}\n")
    assert load_recipe(tmp_path / "r.yaml").run.output_dir == "a/../r"
