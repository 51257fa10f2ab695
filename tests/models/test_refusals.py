"""Models that cannot be fine-tuned: each cause has its own words and its own way out, the same from every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, GptOssConfig, T5Config

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands import plan
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE
from qlora_lowmem.recipe.io import load_recipe
from tiny_chat import write_tiny_chat

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
QUANTISED = ("is already quantised (", "give the 16-bit model that this one was made of")
NOT_CAUSAL = ("is no causal language model", "a class that ends in ForCausalLM")

# Cause: how the folder of a good model gets it, and what is said of it.
CAUSES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{
        method: ({"quantization_config": {"quant_method": method, **options}}, (QUANTISED[0] + method, QUANTISED[1]))
        for method, options in {
            "fp8": {"weight_block_size": [128, 128]},
            "awq": {"bits": 4},
            "gptq": {"bits": 4},
            "mxfp4": {},
            "compressed-tensors": {},
        }.items()
    },
    "bitsandbytes 8-bit": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        (f"{QUANTISED[0]}bitsandbytes, 8 bits", QUANTISED[1]),
    ),
    "encoder-decoder": (T5Config(d_model=32, architectures=["T5ForConditionalGeneration"]).to_dict(), NOT_CAUSAL),
    "encoder": (BertConfig(architectures=["BertForMaskedLM"], **SIZES).to_dict(), NOT_CAUSAL),
    "unknown": ({"model_type": "nonesuch"}, ("does not know the architecture 'nonesuch'", "--upgrade transformers")),
    "attention": (
        GptOssConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, head_dim=16).to_dict(),
        ("base.attention: 'sdpa'", "has it not for GptOssForCausalLM", "set base.attention to auto"),
    ),
    "incomplete": (
        {"model_type": "nemotron", "num_key_value_heads": None, "rms_norm_eps": None},
        ("makes no nemotron of the config.json", "A field is missing there"),
    ),
    "damaged": ({}, ("has a damaged file", "model.safetensors", "copy it again from its source")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By cause: a folder with `model`, `data.jsonl`, and the run `out` of before the model came to this."""
    base = tmp_path_factory.mktemp("causes")

    def make(cause: str) -> Path:
        folder = base / cause
        if not folder.exists():
            write_tiny_chat(folder / "model")
            changes, _ = CAUSES[cause]
            config, weights = folder / "model" / "config.json", folder / "model" / "model.safetensors"
            before = {} if "model_type" in changes else json.loads(config.read_text())
            config.write_text(json.dumps(before | changes, default=str))
            if cause == "damaged":
                weights.write_bytes(weights.read_bytes()[:-64])
            _write_run(folder, "sdpa" if cause == "attention" else "auto")
        return folder

    return make


def _write_run(folder: Path, attention: str) -> None:
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = load_recipe(
        RECIPES / "demo.yaml", {"model": str(folder / "model"), "attention": attention, "lora_r": 2, "lora_alpha": 4}
    )
    out = folder / "out"
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(2, 32), key.format("B"): torch.ones(32, 2)}, out / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("command", ["train --dry-run", "train", "plan", "merge"])
@pytest.mark.parametrize("cause", CAUSES)
def test_the_same_from_every_command(
    folders: Callable[[str], Path],
    recipe_runs: virtual_gpu.Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cause: str,
    command: str,
) -> None:
    folder = folders(cause)
    model = ["--model", str(folder / "model"), *(["--attention", "sdpa"] if cause == "attention" else [])]
    train = ["--config", str(RECIPES / "demo.yaml"), *model, "--data", str(folder / "data.jsonl"), "--quiet"]
    words = {
        "train": [*train, "--output-dir", str(tmp_path / "out"), "--device", "cpu"],
        "train --dry-run": [*train, "--dry-run"],
        "plan": [*model, "--card", "rtx-4050-laptop-6gb", "--seq", "64", "--no-cache"],
        "merge": ["--run", str(folder / "out"), "--to", str(tmp_path / "merged"), "--device", "cpu", "--quiet"],
    }[command]
    monkeypatch.setattr(plan, "recipe_server", lambda _workers: _Shared(recipe_runs))
    assert run_command(command.split()[0], words) == EXIT_USAGE
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    for part in CAUSES[cause][1]:
        assert part in said[0]
    assert _first_words.setdefault(cause, said[0]) == said[0]


_first_words: dict[str, str] = {}


class _Shared:
    """A server that outlives the command."""

    def __init__(self, server: virtual_gpu.Server) -> None:
        self._server = server

    def __enter__(self) -> virtual_gpu.Server:
        return self._server

    def __exit__(self, *_exception: object) -> None:
        pass
