"""A wrapper learns from text in its language model alone, without encoders; the whole wrapper takes what came of it.

Gemma 3 with vision, Qwen3-VL and Mistral 3, tiny, as their makers' folders are: names of weights that transformers
converts on loading, and a picture's encoder before the language model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from qlora_lowmem.models.adapters import Adapted
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of, preflight
from tiny_chat import tiny_tokenizer

_TEXT: dict[str, Any] = {
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
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 32, "patch_size": 16}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
_QWEN_VISION = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"model_type": "gemma3_text"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
    },
}


def whole(folder: Path) -> Any:
    """The wrapper with all of its parts."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a whole wrapper, random."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**WRAPPERS[request.param])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def recipe_of(tiny_recipe: Callable[..., Recipe], wrapper: Path, **changes: Any) -> Recipe:
    small = {"weights": "pretrained", "load_in_4bit": False, "target_modules": "all-linear", "max_steps": 2}
    return tiny_recipe("run", model=str(wrapper), learning_rate=0.1, **small, **changes)


@pytest.mark.parametrize("lean", [False, True])
def test_the_language_model_learns(
    tiny_recipe: Callable[..., Recipe], wrapper: Path, tmp_path: Path, lean: bool
) -> None:
    inputs = inputs_of(recipe_of(tiny_recipe, wrapper, lean=lean))
    told = preflight(inputs).adapted
    assert len(told.modules) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in told.modules)
    models: list[Any] = []
    execute(inputs, output_dir=tmp_path / "run", on_ready=lambda job, _: models.append(job.model))
    (adapted,) = models
    assert Adapted.of(adapted) == told
    names = [name for name, _ in adapted.named_parameters()]
    assert not [name for name in names if "vis" in name or "projector" in name], "encoders are not there at all"
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    learned = {name for name, tensor in kept.items() if "lora_B" in name and tensor.abs().max() > 0}
    assert len(learned) == len(told.modules), "every adapter has learned"

    loaded = PeftModel.from_pretrained(whole(wrapper), tmp_path / "run")
    assert Adapted.of(loaded.train()).modules == told.modules, "and the whole wrapper takes them, no more"
    tokens = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens).logits
        found = loaded.eval()(input_ids=tokens).logits
        plain = whole(wrapper).eval()(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
