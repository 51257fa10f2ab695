"""Presets and names resolved against real architectures; nothing that matches nothing passes silently."""

import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models import targets
from qlora_lowmem.models.random_weights import config_from, meta_model
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.models.targets import resolve_targets, targets_of
from qlora_lowmem.recipe.sections import Lora


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


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (Lora(target_modules=r".*\.layers\.(5|15)\.self_attn\.[qv]_proj"), 4),
        (Lora(target_modules="attention", exclude_modules=("o_proj",)), 4 * 3),
        (Lora(target_modules="attention", exclude_modules=("layers.5", "mamba")), 3 * 4),
        (Lora(target_modules="all-linear", exclude_modules=r".*\.(mamba|shared_mlp)\..*"), 4 * 4),
        (Lora(target_modules=("q_proj", "in_proj"), exclude_modules=("in_proj", "v_proj")), 4),
    ],
)
def test_expressions_and_exclusions_are_what_peft_adapts(chosen: Lora, count: int) -> None:
    hybrid = model("granite-4.0-h-1b")
    targets = targets_of(hybrid, chosen)
    assert len(targets.modules) == count
    adapted = get_peft_model(hybrid, LoraConfig(target_modules=list(targets.names)))
    found = {
        name.removeprefix("base_model.model.") for name, each in adapted.named_modules() if hasattr(each, "lora_A")
    }
    assert found == set(targets.modules)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (Lora(target_modules="q_proj.*"), "lora.target_modules: 'q_proj.*' matches no module"),
        (Lora(exclude_modules=("q_proj", "layers.99")), "lora.exclude_modules: 'layers.99' matches no module"),
        (Lora(exclude_modules=("ayers.5",)), "their paths look like model.layers.0."),
        (Lora(target_modules=("q_proj",), exclude_modules=r".*_proj"), "excludes every module that target_modules"),
    ],
)
def test_what_matches_nothing_or_leaves_nothing_is_refused(chosen: Lora, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        targets_of(model("granite-4.0-h-1b"), chosen)
    assert said in str(caught.value)


def tiny_model(family: str) -> PreTrainedModel:
    return meta_model(config_from(tiny(family)), torch.bfloat16, "auto")


def test_attention_is_found_by_its_class() -> None:
    """Nemotron-H calls every layer's block a mixer."""
    targets = resolve_targets(tiny_model("nemotron_h"), "attention")
    assert targets.names == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert len(targets.modules) == 4


def test_what_peft_refuses_is_no_target() -> None:
    targets = resolve_targets(tiny_model("falcon_h1"), "all-linear")
    assert "out_proj" not in targets.names
    assert "in_proj" in targets.names
    with pytest.raises(UsageError, match="that PEFT adapts"):
        resolve_targets(tiny_model("falcon_h1"), ("out_proj",))


def test_a_name_that_is_also_a_container_s_becomes_paths() -> None:
    """PEFT would be asked to adapt whatever ends in it; CTRL names a feed-forward part by numbers."""
    model = tiny_model("ctrl")
    targets = resolve_targets(model, "all-linear")
    asked = [
        name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{each}") for each in targets.names)
    ]
    assert sorted(asked) == sorted(targets.modules)
    assert any(name.endswith(".ffn.0") for name in targets.names)


def test_conv1d_is_a_linear_and_a_router_is_none() -> None:
    assert len(resolve_targets(tiny_model("gpt2"), "all-linear").modules) == 8
    assert not any("router" in name for name in resolve_targets(tiny_model("llama4_text"), "all-linear").modules)


def test_a_linear_with_a_forward_of_its_own_is_asked_what_it_gives() -> None:
    """Falcon's gives a tensor, and is adapted; see Llama 4's router above."""
    assert len(resolve_targets(tiny_model("falcon"), "all-linear").modules) == 8


class _Pair(torch.nn.Linear):
    def forward(self, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input + other)


def test_a_linear_that_takes_more_than_rows_is_no_target() -> None:
    assert not targets._is_plain(_Pair(2, 2))
    assert targets._is_plain(torch.nn.Linear(2, 2))
