"""Presets and names resolved against real architectures; nothing that matches nothing passes silently."""

import pytest
import torch
from transformers import PreTrainedModel

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.random_weights import config_from, meta_model
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.models.targets import resolve_targets


def model(name: str) -> PreTrainedModel:
    return meta_model(config_from(architecture(name)), torch.bfloat16, "sdpa")


@pytest.mark.parametrize(
    ("name", "preset", "names", "count"),
    [
        ("granite-4.0-h-1b", "attention", ("k_proj", "o_proj", "q_proj", "v_proj"), 4 * 4),
        ("granite-4.0-h-1b", "attention-qv", ("q_proj", "v_proj"), 4 * 2),
        (
            "granite-4.0-h-1b",
            "all-linear",
            ("in_proj", "input_linear", "k_proj", "o_proj", "out_proj", "output_linear", "q_proj", "v_proj"),
            4 * 4 + 36 * 2 + 40 * 2,
        ),
        ("granite-4.0-1b", "attention", ("k_proj", "o_proj", "q_proj", "v_proj"), 40 * 4),
        ("smollm2-135m-instruct", "attention-qv", ("q_proj", "v_proj"), 30 * 2),
    ],
)
def test_presets(name: str, preset: str, names: tuple[str, ...], count: int) -> None:
    targets = resolve_targets(model(name), preset)
    assert targets.names == names
    assert len(targets.modules) == count


def test_a_suffix_of_whole_parts_matches_as_in_peft() -> None:
    hybrid = model("granite-4.0-h-350m")
    assert len(resolve_targets(hybrid, ("mamba.in_proj",)).modules) == 28
    with pytest.raises(UsageError, match="matches no Linear"):
        resolve_targets(hybrid, ("amba.in_proj",))


@pytest.mark.parametrize("name", ["gate_proj", "qproj", "conv1d"])
def test_a_name_that_matches_nothing_lists_what_would(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_targets(model("granite-4.0-h-1b"), ("q_proj", name))
    assert repr(name) in str(caught.value)
    assert "in_proj (36)" in str(caught.value)
    assert "all-linear" in str(caught.value)


def test_the_lm_head_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="would never train"):
        resolve_targets(model("granite-4.0-350m"), ("lm_head",))
