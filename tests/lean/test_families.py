"""Families built like Llama, in tiles, beside transformers' own forward."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_lowmem.lean import LeanOptions, apply_lean, decoder, foresee_lean
from qlora_lowmem.lean.families import TILED_FAMILIES, takes_tiles

from .conftest import VOCABULARY, batch_of, lean_copy, relative, step

SMALL = LeanOptions(tile_length=16, feed_forward_tile_length=7, loss_tile_bytes=VOCABULARY * 4 * 10)
# What each adds to Llama, made to matter.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 2.0
    },
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bare(family: str, **changes: Any) -> nn.Module:
    """A random model of three layers (or as `changes` say) whose norms and biases are none of the initial ones."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(family, **fields | FAMILIES[family] | {"pad_token_id": 0} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif name.endswith("bias"):
                parameter.uniform_(-0.2, 0.2)
    return model


def adapted(family: str, *, lora_dropout: float = 0.0, **changes: Any) -> nn.Module:
    """With LoRA on all linear layers."""
    lora = LoraConfig(r=4, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False, lora_dropout=lora_dropout)
    return get_peft_model(bare(family, **changes), lora, autocast_adapter_dtype=False).train()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_loss_and_gradients(assert_same_step: Callable[..., None], family: str, padding: str | None) -> None:
    assert_same_step(adapted(family), SMALL, batch_of(2, 40, padding))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking trains models for minutes
)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 5),
    heads=st.sampled_from([(4, 4), (4, 1), (6, 2)]),
    seq=st.integers(4, 50),
    batch=st.integers(1, 3),
    tile=st.integers(4, 24),
    feed_forward=st.integers(1, 24),
    checkpointing=st.sampled_from(["layer", "segments", "host"]),
    padding=st.sampled_from([None, "left", "right"]),
)
def test_same_loss_and_gradients_of_many_shapes(
    assert_same_step: Callable[..., None],
    family: str,
    layers: int,
    heads: tuple[int, int],
    seq: int,
    batch: int,
    tile: int,
    feed_forward: int,
    checkpointing: str,
    padding: str | None,
) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": 8 * heads[0]}
    changes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if family == "smollm3":
        changes["no_rope_layers"] = [position % 2 for position in range(layers)]
    options = LeanOptions(tile_length=tile, feed_forward_tile_length=feed_forward, checkpointing=checkpointing)
    assert_same_step(adapted(family, **changes), options, batch_of(batch, seq, padding))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_further_from_the_truth(autocast: bool) -> None:
    """As for hybrids (`test_model.py`): the mean relative error of the gradients against that of the plain model, all
    families taken together, for rounding is chance."""
    ratios = []
    for family in FAMILIES:
        truth_model = adapted(family)
        plain = copy.deepcopy(truth_model).bfloat16()
        truth_model.load_state_dict({k: v.float() for k, v in plain.state_dict().items()})
        inputs = batch_of(2, 64)
        truth_loss, truth = step(truth_model, inputs)
        errors = []
        for model in (lean_copy(plain, SMALL), plain):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss, gradients = step(model, inputs)
            assert abs(loss - truth_loss) <= 1e-3 * truth_loss
            errors.append(sum(relative(gradients[name], truth[name]) for name in truth))
        ratios.append(errors[0] / errors[1])
    assert torch.tensor(ratios).log().mean().exp() <= 1.02, ratios


def test_dropout_drops_the_same_elements_in_backward() -> None:
    """A directional derivative, by differences, of a step whose dropout is fixed by a seed."""
    model = lean_copy(adapted("llama", lora_dropout=0.3), SMALL).double()
    inputs = batch_of(1, 40)

    def loss_at(shift: float, direction: dict[str, torch.Tensor]) -> float:
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in shifted.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=shift)
            torch.manual_seed(7)
            return float(shifted(**inputs).loss.item())

    torch.manual_seed(7)
    _, gradients = step(model, inputs)
    direction = {name: g / g.norm() for name, g in gradients.items()}
    expected = sum(g.norm().item() for g in gradients.values())
    found = (loss_at(1e-3, direction) - loss_at(-1e-3, direction)) / 2e-3
    assert abs(found - expected) <= 2e-2 * expected  # other masks in backward: tens of percents


def test_packed_samples_are_kept_apart(assert_same_step: Callable[..., None]) -> None:
    """Positions tell transformers where samples end; such calls take the decoder's own forward, checkpointed, and its
    hidden states the loss by tiles."""
    inputs = batch_of(1, 40)
    inputs["position_ids"] = torch.cat([torch.arange(25), torch.arange(15)])[None]
    inputs.pop("attention_mask")
    plain = adapted("llama")
    assert_same_step(plain, SMALL, inputs)
    lean = lean_copy(plain, SMALL)
    assert lean.get_base_model().is_activation_checkpointing
    assert lean(**inputs, use_cache=False).logits is None


WINDOWS = [
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
]


@pytest.mark.parametrize("seq", [16, 17, 40])
@pytest.mark.parametrize(("family", "changes"), WINDOWS)
def test_sliding_windows(
    assert_same_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    changes: dict[str, Any],
    seq: int,
) -> None:
    """Up to a window's length everything is seen, so tiles serve; what is longer takes the decoder's own forward."""
    in_tiles = []
    run_layers = decoder.run_layers
    monkeypatch.setattr(decoder, "run_layers", lambda *given: in_tiles.append(1) or run_layers(*given))
    plain = adapted(family, **changes)
    assert "longer than its window of 16" in str(apply_lean(copy.deepcopy(plain), SMALL))
    assert_same_step(plain, LeanOptions(tile_length=7), batch_of(2, seq))
    assert bool(in_tiles) is (seq <= 16)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_tiles_do_not_know_keeps_the_general_ideas(
    assert_same_step: Callable[..., None], family: str, changes: dict[str, Any], words: str
) -> None:
    plain = adapted(family, **changes)
    report = apply_lean(copy.deepcopy(plain), SMALL)
    assert set(report.applied) == {"adapters", "rms_norm", "checkpointing", "loss"}
    assert words in str(report)
    if "attention_dropout" not in changes:
        assert_same_step(plain, SMALL, batch_of(2, 30))


def test_a_configuration_says_before_torch_is_there_what_the_model_takes() -> None:
    """Each type is the class that transformers makes of it, and a refusal is the same from the file and the model."""
    assert {kind: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in TILED_FAMILIES} == {
        kind: family.causal_class for kind, family in TILED_FAMILIES.items()
    }
    for kind in FAMILIES:
        assert takes_tiles({"model_type": kind})
        for changes in ({}, {"attention_dropout": 0.1}, {"hidden_act": "gelu"}):
            with torch.device("meta"):
                skeleton = bare(kind, **changes)
            assert takes_tiles({"model_type": kind, **changes}) is ("tiles" in foresee_lean(skeleton).applied)
    assert not takes_tiles({"model_type": "gemma"})
    assert not takes_tiles({})
    program = "from qlora_lowmem.lean.families import *; import sys; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("family", [*FAMILIES, "gemma"])
def test_foreseen_as_applied(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of a model without values, and what is done to it."""
    monkeypatch.setitem(FAMILIES, "gemma", {"head_dim": 8})
    with torch.device("meta"):
        skeleton = bare(family)
    assert foresee_lean(skeleton).ideas == apply_lean(bare(family)).ideas


def test_generation_is_as_before() -> None:
    plain = adapted("qwen3").eval()
    lean = lean_copy(plain, SMALL)
    tokens = batch_of(1, 12)["input_ids"]
    generated = [model.generate(tokens, max_new_tokens=8, do_sample=False) for model in (plain, lean)]
    assert torch.equal(*generated)
