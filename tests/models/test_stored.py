"""Weights that are not those of their config.json: refused from the files' headers, before a byte of them is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import RECIPES
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.loading import skeleton
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe.io import load_recipe
from tiny_chat import write_tiny_chat

Q = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("stored") / "model")


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def made(folder: Path) -> None:
    recipe = load_recipe(RECIPES / "demo.yaml", {"model": str(folder)})
    skeleton(recipe, source_of(recipe))


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        made(folder)
    return str(caught.value)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if n != Q}, f"missing: {Q}."),
        (lambda tensors: {n: t for n, t in tensors.items() if "embed" not in n}, "missing: model.embed_tokens.weight"),
        (renamed, f"missing: {Q}, model.layers.1.self_attn.q_proj.weight"),
        (lambda _: {}, "missing: model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight"),
        (
            lambda tensors: tensors | {Q: torch.zeros(32, 31)},
            f"shape: {Q} is (32, 31) there and (32, 32) here",
        ),
        (lambda tensors: tensors | {Q: torch.zeros(1024)}, f"{Q} is (1024) there"),
        (lambda tensors: tensors | {Q: torch.zeros(32, 32, dtype=torch.int8)}, f"no weights: {Q} is stored as I8"),
        (lambda tensors: tensors | {Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
    ],
)
def test_weights(model: Path, change: Callable[[Tensors], Tensors], says: str) -> None:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    message = refusal(model)
    assert "the weights are not those of its config.json, which makes a LlamaForCausalLM" in message
    assert says in message
    assert "Take config.json and all *.safetensors from one place" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, "of another shape"),
        ({"head_dim": 16}, "of another shape"),
        ({"num_key_value_heads": 4}, "of another shape"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5, which does not divide its num_attention_heads 4"),
        ({"vocab_size": 7}, "of another shape"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "of layers beyond the last: model.layers.1."),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"attention_bias": True}, "missing: model.layers.0.self_attn.q_proj.bias"),
        ({"model_type": "gpt2"}, "which makes a GPT2LMHeadModel: missing"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "and none is"),
        ({"num_hidden_layers": 10**30}, "models have 1 to 4,096 layers"),
        ({"hidden_size": 0}, "has hidden_size 0, and models have some"),
        ({"intermediate_size": 0}, "has intermediate_size 0, and models have some"),
        ({"vocab_size": 0}, "has vocab_size 0, and models have some"),
        ({"num_attention_heads": -4}, "has num_attention_heads -4, and models have some"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads 0, and models have some"),
        ({"text_config": "llama"}, "has a text_config that is no object"),
        ({"text_config": {"hidden_size": 0}}, "has hidden_size 0"),
        ({"num_attention_heads": "4"}, "base.model: transformers"),
        ({"hidden_act": "nonesuch"}, "base.model: transformers"),
        ({"rope_parameters": {"rope_type": "nonesuch"}}, "base.model: transformers"),
    ],
)
def test_configurations(model: Path, changes: dict[str, Any], says: str) -> None:
    configure(model, **changes)
    assert says in refusal(model)


def test_a_configuration_of_a_type_alone_is_not_built_at_its_default_size(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert "model.embed_tokens.weight is (400, 32) there and (32000, 4096) here" in refusal(model)


def test_an_index_is_read_as_transformers_reads_it(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text("{}")
    made(model)  # model.safetensors is there, and transformers takes that
    (model / "model.safetensors").unlink()
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, model / name, metadata={"format": "pt"})
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in halves.items() for key in keys}}))
    made(model)
    (model / "b.safetensors").unlink()
    assert f"'{model / 'b.safetensors'}' cannot be read" in refusal(model)
    index.write_text('{"weight_map": {"a": 3}}')
    assert "cannot be read" in refusal(model)
