"""Places and sizes that tests share."""

import importlib
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "bench" / "recipes"

# Overrides of granite-4.0-h-350m's config.json: four layers, a few thousand weights each.
TINY_HYBRID: dict[str, Any] = {
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "shared_intermediate_size": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}


def without_kernels(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash-linear-attention is installed, transformers calls its Triton kernels on a CPU too: plain code here.

    Args:
        model: the module of a model in transformers.
    """
    module = importlib.import_module(model)
    for name, function in list(vars(module).items()):
        if "gated_delta_rule" in name and hasattr(function, "__wrapped__"):
            monkeypatch.setattr(module, name, function.__wrapped__)


def write_script(folder: Path) -> Path:
    """The project's script in `folder`, as pip makes it of pyproject.toml's entry."""
    ((name, entry),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    module, function = entry.split(":")
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    path.chmod(0o755)
    return path


# Sizes of a tiny decoder, by the names that most families of transformers give them.
TINY_DECODER: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
