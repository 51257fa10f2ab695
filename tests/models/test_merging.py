"""A merged model is the base plus scale * B A, and says what the base with its adapter says."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.models import merging
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.recipe.io import load_recipe
from tiny_chat import write_tiny_chat

main = partial(run_command, "merge")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("merging") / "model")


def trained(base: Path, run: Path, **options: Any) -> Recipe:
    """A run's folder whose adapter changes a lot: B is no longer zero."""
    recipe = load_recipe(
        RECIPES / "demo.yaml",
        {
            "model": str(base),
            "output_dir": str(run),
            "lora_r": 4,
            "lora_alpha": 8,
            "use_rslora": options.get("use_rslora", False),
        },
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], **options)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(run)
    AutoTokenizer.from_pretrained(base).save_pretrained(run)
    content = {"hash": recipe_hash(recipe), "recipe": recipe.to_dict(), "data_bytes": 0}
    (run / "recipe.json").write_text(json.dumps(content))
    return recipe


def test_merged_tile_by_tile_and_shard_by_shard(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_TILE_BYTES", 7 * 4 * 32)  # seven rows of the hidden size
    monkeypatch.setattr(merging, "_SHARD_BYTES", 20_000)
    run, to = tmp_path / "run", tmp_path / "merged"
    trained(base, run)
    assert main(["--run", str(run), "--to", str(to), "--device", "cpu", "--quiet"]) == 0
    index = json.loads((to / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    merged: dict[str, torch.Tensor] = {}
    for path in to.glob("*.safetensors"):
        merged |= load_file(path)
    before, adapter = load_file(base / "model.safetensors"), load_file(run / "adapter_model.safetensors")
    assert merged.keys() == before.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        expected = weight.float()
        if key.format("A") in adapter:
            expected = expected + 2.0 * adapter[key.format("B")] @ adapter[key.format("A")]
        assert merged[name].dtype == torch.bfloat16
        assert torch.allclose(merged[name].float(), expected, rtol=2**-8, atol=1e-7), name


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_it_loads_without_peft_and_says_the_same(base: Path, tmp_path: Path, rank_stabilised: bool) -> None:
    run, to = tmp_path / "run", tmp_path / "merged"
    trained(base, run, use_rslora=rank_stabilised)
    assert main(["--run", str(run), "--to", str(to), "--dtype", "fp16", "--device", "cpu", "--quiet"]) == 0
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(to)
    assert merged.dtype == torch.float16
    tokens = AutoTokenizer.from_pretrained(to)("What is NF4?", return_tensors="pt").input_ids
    with torch.no_grad():
        without = plain(tokens).logits
        found = merged.float()(tokens).logits
        expected: Any = PeftModel.from_pretrained(plain, run)(tokens).logits
    assert torch.allclose(found, expected, atol=2e-3)
    assert not torch.allclose(without, expected, atol=2e-2), "the adapter must matter"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--device", "cpu"]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_merged_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = tmp_path / "run", tmp_path / "merged"
    assert "there is no folder" in refused(capsys, "--run", str(run), "--to", str(to))
    recipe = trained(base, run, rank_pattern={"q_proj": 2})
    assert "rank_pattern is {'q_proj': 2}; only plain LoRA" in refused(capsys, "--run", str(run), "--to", str(to))
    trained(base, run)
    to.mkdir()
    (to / "file").write_text("mine")
    assert "exists already" in refused(capsys, "--run", str(run), "--to", str(to))
    (to / "file").unlink()
    random = recipe.to_dict()
    random["base"]["weights"] = "random"
    (run / "recipe.json").write_text(json.dumps({"recipe": random}))
    assert "random weights" in refused(capsys, "--run", str(run), "--to", str(to))
    (run / "recipe.json").unlink()
    assert "holds no recipe.json" in refused(capsys, "--run", str(run), "--to", str(to))
    assert list(to.iterdir()) == []


def test_the_adapter_of_another_model_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = tmp_path / "run", tmp_path / "merged"
    trained(base, run)
    path = run / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 48)
    save_file(weights, path)
    assert "an adapter of another model" in refused(capsys, "--run", str(run), "--to", str(to))
    assert not to.exists()


def test_a_full_disk_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, to = tmp_path / "run", tmp_path / "merged"
    trained(base, run)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "save_file", full)
    assert "No space left on device" in refused(capsys, "--run", str(run), "--to", str(to))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_no_disk_has_room_for_this(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trained(base, run)
    monkeypatch.setattr(merging, "merged_bytes", lambda *_: 2**60)
    assert "the merged model takes" in refused(capsys, "--run", str(run), "--to", str(tmp_path / "merged"))


def test_a_base_in_4_bits_is_said_before_training_and_dequantised(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    folder, run, to = tmp_path / "4bit", tmp_path / "run", tmp_path / "merged"
    packed.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder), "--dry-run", "--quiet"]
    assert run_command("train", flags) == 0
    assert "in 4 bits already (bitsandbytes, 4 bits)" in capsys.readouterr().out
    trained(base, run)
    (run / "recipe.json").write_text((run / "recipe.json").read_text().replace(str(base), str(folder)))
    assert main(["--run", str(run), "--to", str(to), "--device", "cpu", "--quiet"]) == 0
    merged, adapter = load_file(to / "model-00001-of-00001.safetensors"), load_file(run / "adapter_model.safetensors")
    assert "quantization_config" not in json.loads((to / "config.json").read_text())
    for name, module in packed.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        key = f"base_model.model.{name}.lora_{{}}.weight"
        if key.format("A") in adapter:
            expected = expected + 2.0 * adapter[key.format("B")] @ adapter[key.format("A")]
        assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=2**-7, atol=1e-6), name
