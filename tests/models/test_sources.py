"""Where a model's name leads, and the known architectures' sizes."""

import json
from pathlib import Path

import pytest

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
}


def test_every_known_architecture_has_a_count() -> None:
    assert sorted(PARAMETERS) == known_architectures()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_count(name: str) -> None:
    import torch

    model = meta_model(config_from(architecture(name)), torch.bfloat16, "sdpa")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


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
