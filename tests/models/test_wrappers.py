"""A wrapper learns from text in its language model alone, without encoders; the whole wrapper takes what came of it.

Gemma 3 with vision, Qwen3-VL and Mistral 3, tiny, as their makers' folders are: names of weights that transformers
converts on loading, and a picture's encoder before the language model.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from helpers import TINY_DECODER, without_kernels
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.models import wrappers
from qlora_lowmem.models.adapters import Adapted, lora_config
from qlora_lowmem.models.targets import targets_of
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of, preflight
from tiny_chat import tiny_tokenizer

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 32, "patch_size": 16}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
_QWEN_VISION = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TINY_DECODER | {"model_type": "gemma3_text"},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "qwen3_vl": {
        "text_config": TINY_DECODER | {"rope_parameters": _MROPE},
        "vision_config": _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    },
    "mistral3": {
        "text_config": TINY_DECODER | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
    },
}
# Qwen 3.5: transformers has a class of its language model alone, and takes a prefix out of its weights' names.
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
_ITS_LANGUAGE_ALONE = {
    "qwen3_5": {
        "text_config": TINY_DECODER
        | _LINEAR
        | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": _QWEN_VISION,
    }
}


def whole(folder: Path) -> Any:
    """The wrapper with all of its parts."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def write_whole(folder: Path, kind: str) -> Path:
    """A folder with a whole wrapper, random."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(WRAPPERS | _ITS_LANGUAGE_ALONE)[kind])
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_whole(tmp_path / "model", request.param)


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


@pytest.mark.parametrize("kind", [*WRAPPERS, *_ITS_LANGUAGE_ALONE])
def test_merged_it_loads_whole(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The names in the files are not those in the model; what is merged has the files' names, pictures' weights too."""
    without_kernels(f"transformers.models.{kind}.modeling_{kind}", monkeypatch)
    base, run, to = write_whole(tmp_path / "model", kind), tmp_path / "run", tmp_path / "merged"
    recipe = recipe_of(tiny_recipe, base, scan="plain")
    model = wrappers.from_pretrained(str(base), dtype=torch.float32)
    targets = targets_of(model, recipe.lora)
    adapted: Any = get_peft_model(model, lora_config(recipe, targets.names, targets.within))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(run)
    tiny_tokenizer().save_pretrained(run)
    (run / "recipe.json").write_text(json.dumps({"hash": recipe_hash(recipe), "recipe": recipe.to_dict()}))
    assert run_command("merge", ["--run", str(run), "--to", str(to), "--dtype", "fp16", "--device", "cpu"]) == 0

    before, after = load_file(base / "model.safetensors"), load_file(to / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.allclose(tensor, after[name].float(), atol=1e-3)}
    assert len(changed) == len(targets.modules)
    assert not [name for name in changed if "vis" in name]
    tokens = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens).logits
        plain = whole(base).eval()(input_ids=tokens).logits
        found = whole(to).eval()(input_ids=tokens).logits
        alone = wrappers.from_pretrained(str(to), dtype=torch.float32).eval()(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=2e-2)
    assert torch.allclose(alone, expected, atol=2e-2)
    assert (plain - expected).abs().max() > 0.1, "the adapter must matter"
