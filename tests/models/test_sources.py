"""Where a model's name leads, and the known architectures' sizes."""

import json
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.random_weights import config_from, meta_model
from qlora_lowmem.models.sources import architecture, known_architectures, resolve_model

# Published parameter counts, tied embeddings counted once.
PARAMETERS = {
    "granite-4.0-h-1b": 1_461_538_368,
    "granite-4.0-h-350m": 340_332_224,
    "granite-4.0-h-tiny": 6_939_037_248,
    "granite-4.0-1b": 1_631_750_144,
    "granite-4.0-350m": 352_379_904,
    "smollm2-135m-instruct": 134_515_008,
    "llama-3.2-3b": 3_212_749_824,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-7b": 6_738_546_688,
    "deepseek-coder-1.3b": 1_346_471_936,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gemma-7b": 8_537_680_896,
    "glm-4-9b-0414": 9_400_279_040,
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-8b": 8_170_848_256,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-7b": 7_298_617_344,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
}


def test_every_known_architecture_has_a_count() -> None:
    assert sorted(PARAMETERS) == known_architectures()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_count(name: str) -> None:
    import torch

    model = meta_model(config_from(architecture(name)), torch.bfloat16, "eager")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("model", "name", "hub_id", "context"),
    [
        ("llama-3.1-8b", "llama-3.1-8b", "meta-llama/Llama-3.1-8B", 131_072),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 131_072),
        (
            "mistralai/Mistral-7B-Instruct-v0.3",
            "mistral-7b-instruct-v0.3",
            "mistralai/Mistral-7B-Instruct-v0.3",
            32_768,
        ),
        ("qwen2.5-7b", "qwen2.5-7b", "Qwen/Qwen2.5-7B", 131_072),
        ("qwen2.5-7b-instruct", "qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 32_768),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 8192),
    ],
)
def test_what_people_fine_tune_needs_no_download(model: str, name: str, hub_id: str, context: int) -> None:
    found = resolve_model(model, "random")
    assert (found.name, found.hub_id, found.context_length) == (name, hub_id, context)


def test_every_architecture_has_its_source_and_where_it_is_used() -> None:
    table = tomllib.loads((ROOT / "src/qlora_lowmem/models/known.toml").read_text(encoding="utf-8"))
    assert sorted(table) == known_architectures()
    assert all(entry["source"] and entry["hub"] for entry in table.values())
    assert all(set(entry.get("context", {})) <= set(entry["hub"]) for entry in table.values())
    ids = [hub_id.lower() for entry in table.values() for hub_id in entry["hub"]]
    assert len(set(ids)) == len(ids)
    assert not list((ROOT / "bench").rglob("config.json")), "a model's figures have one owner"


def test_a_hub_id_and_its_short_name_are_one_architecture() -> None:
    short, full = (resolve_model(n, "random") for n in ("granite-4.0-h-1b", "ibm-granite/granite-4.0-h-1b"))
    assert short.architecture == full.architecture
    assert full.hub_id == "ibm-granite/granite-4.0-h-1b"


def test_a_folder_with_only_a_config_serves_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architecture("granite-4.0-350m")))
    assert resolve_model(str(tmp_path), "random").architecture == architecture("granite-4.0-350m")


@pytest.mark.parametrize(
    ("model", "weights", "said"),
    [
        ("granite-4.0-h-2b", "random", "Did you mean 'granite-4.0-h-1b'"),
        ("./no/such/folder", "pretrained", "no folder"),
        ("nobody/no-model", "random", "architecture"),
        ("missing.gguf", "pretrained", "no GGUF file"),
    ],
)
def test_a_model_that_leads_nowhere(model: str, weights: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"base\.") as caught:
        resolve_model(model, weights)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "cannot be read as JSON"), ("{}", "no model_type"), (None, "no config.json")]
)
def test_a_folder_that_is_no_model(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        resolve_model(str(tmp_path), "random")


def test_pretrained_needs_weights_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architecture("granite-4.0-350m")))
    with pytest.raises(UsageError, match="safetensors"):
        resolve_model(str(tmp_path), "pretrained")
