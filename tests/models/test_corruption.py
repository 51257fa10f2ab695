"""Files of a model, an adapter or a tokenizer that are not whole: exit code 2, the file's name, what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE
from tiny_chat import write_tiny_chat

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
Check = Callable[..., None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `data.jsonl` and the run `out`."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_chat(folder / "model")
    (folder / "data.jsonl").write_text(json.dumps(CHAT) + "\n")
    assert run_command("train", flags(folder)) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """Of the same, to be damaged."""
    shutil.copytree(trained, tmp_path / "copy")
    recipe = tmp_path / "copy" / "out" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Check:
    def check(exit_code: int, *said: str) -> None:
        printed = capsys.readouterr().err
        assert exit_code == EXIT_USAGE, printed
        assert printed.count("error: ") == 1
        for words in said:
            assert words in printed, printed
        assert "--to" not in printed
        assert "hub" not in printed

    return check


def flags(folder: Path, output: str = "out") -> list[str]:
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder / "model"), "--max-steps", "1", "--quiet"]
    return [*recipe, "--data", str(folder / "data.jsonl"), "--output-dir", str(folder / output)]


def merged(folder: Path) -> int:
    return run_command(
        "merge", ["--run", str(folder / "out"), "--to", str(folder / "merged"), "--device", "cpu", "--quiet"]
    )


def cut(path: Path) -> Path:
    """The first two thirds of a file are left."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def test_base_weights_to_train(copy: Path, refused: Check) -> None:
    path = cut(copy / "model" / "model.safetensors")
    refused(run_command("train", flags(copy, "new")), f"damaged file: '{path}'", "copy it again")
    assert not (copy / "new").exists()  # nothing was trained


def test_base_weights_to_merge(copy: Path, refused: Check) -> None:
    path = cut(copy / "model" / "model.safetensors")
    refused(merged(copy), f"damaged file: '{path}'", "copy it again")
    path.rename(copy / "model" / "other.safetensors")
    refused(merged(copy), "damaged file", "other.safetensors")
    shutil.copy(copy / "out" / "adapter_model.safetensors", copy / "model" / "other.safetensors")
    refused(merged(copy), f"'{path}' cannot be read (No such file", "Fetch or copy the base model's file again")


def test_base_index_to_merge(copy: Path, refused: Check) -> None:
    path = copy / "model" / "model.safetensors.index.json"
    path.write_text('{"weight_map": {')
    refused(merged(copy), f"damaged file: '{path}'", "it is no JSON")
    (copy / "model" / "model.safetensors").rename(copy / "model" / "part.safetensors")  # else transformers takes it
    path.write_text("{}")
    refused(merged(copy), f"'{path}' cannot be read", "it has no 'weight_map'")


def test_adapter(copy: Path, refused: Check) -> None:
    path = cut(copy / "out" / "adapter_model.safetensors")
    refused(merged(copy), f"'{path}' cannot be read", "another checkpoint")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_adapter_configuration(copy: Path, refused: Check, content: str) -> None:
    path = copy / "out" / "adapter_config.json"
    path.write_text(content)
    refused(merged(copy), f"'{path}' cannot be read", "another checkpoint")


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 4), ("r", 0), ("r", "x"), ("r", None), ("lora_alpha", 32), ("use_rslora", True), ("peft_type", None)],
)
def test_adapter_configuration_against_the_recipe(
    copy: Path, refused: Check, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    path = copy / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(merged(copy), f"{path}: {name} is {value!r}", "another checkpoint")
    assert not (copy / "merged").exists()
    said = run_command("generate", ["--run", str(copy / "out"), "--prompt", "a", "--quiet"])
    refused(said, f"{path}: {name} is {value!r}")
    assert not capsys.readouterr().out


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({A: torch.zeros(4, 32)}, "and lora.lora_r of the recipe is 8"),
        ({A: torch.zeros(256)}, "and lora.lora_r of the recipe is 8"),
        ({A: torch.zeros(8, 32, dtype=torch.int64)}, "belongs to no LoRA adapter"),
        ({A: None}, "self_attn.q_proj only lora_B is there"),
    ],
)
def test_adapter_tensors(copy: Path, refused: Check, changes: dict[str, torch.Tensor | None], says: str) -> None:
    path = copy / "out" / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    refused(merged(copy), str(path), says)


def test_an_adapter_without_a_module_that_its_configuration_has(copy: Path, refused: Check) -> None:
    """PEFT makes the module's adapter, and leaves it at zero."""
    path = copy / "out" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "layers.0.mlp.up_proj" not in name}, path)
    refused(run_command("generate", ["--run", str(copy / "out"), "--prompt", "a", "--quiet"]), "layers.0.mlp.up_proj")


def test_no_adapter_configuration(copy: Path, refused: Check) -> None:
    path = copy / "out" / "adapter_config.json"
    path.unlink()
    refused(merged(copy), f"'{path}' cannot be read (No such file")


@pytest.mark.parametrize("dry", [True, False])
def test_tokenizer(copy: Path, refused: Check, dry: bool) -> None:
    path = cut(copy / "model" / "tokenizer.json")
    refused(
        run_command("train", [*flags(copy, "new"), *(["--dry-run"] if dry else [])]),
        f"damaged file: '{path}'",
        "copy it",
    )


def test_a_tokenizer_that_is_json_and_none(copy: Path, refused: Check) -> None:
    """The package tokenizers raises a bare Exception here."""
    (copy / "model" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    refused(run_command("train", flags(copy, "new")), f"from '{copy / 'model'}'", "copy the folder again")
