"""Packing is allowed where no packed sample sees another, which is run here for each type, and refused elsewhere."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import RECIPES
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.targets import KEEPS_APART, why_not_packed
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run.preflight import inputs_of, preflight

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}


def largest_difference(config: Any, attention: str) -> float:
    """Between the logits of two samples in one row, as TRL's collator passes them, and one by one."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    samples = [torch.randint(3, 64, (1, length)) for length in (7, 9)]
    ends = torch.tensor([0, 7, 16], dtype=torch.int32)
    packed = {
        "position_ids": torch.cat([torch.arange(7), torch.arange(9)])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 9,
        "max_length_k": 9,
        "seq_idx": torch.tensor([[0] * 7 + [1] * 9], dtype=torch.int32),
    }
    with torch.no_grad():
        together = model(torch.cat(samples, 1), **packed, use_cache=False).logits
        apart = torch.cat([model(sample, use_cache=False).logits for sample in samples], 1)
    return float((together - apart).abs().max() / apart.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", KEEPS_APART)
def test_packed_samples_do_not_see_each_other(model_type: str, attention: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    assert why_not_packed(config) is None
    assert largest_difference(config, attention) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_why_granite_hybrids_without_mamba_are_refused(attention: str) -> None:
    """If transformers passes positions to their masks one day, this fails, and the refusal may go."""
    dense = {"layer_types": ["attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 64}
    config = AutoConfig.for_model("granitemoehybrid", **SMALL, **HYBRID, **dense, position_embedding_type="rope")
    assert "without looking where packed samples end" in str(why_not_packed(config))
    assert largest_difference(config, attention) > 0.1


def test_why_hybrids_are_refused() -> None:
    layers = {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64}
    config = AutoConfig.for_model("granitemoehybrid", **SMALL, **HYBRID, **layers)
    assert "1 of its 2 layers are recurrent" in str(why_not_packed(config))
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        largest_difference(config, "sdpa")


def test_a_type_that_was_not_tested_is_refused() -> None:
    assert "whether gpt2 keeps packed samples apart is not tested" in str(why_not_packed(AutoConfig.for_model("gpt2")))


def test_the_recipe_is_refused_before_anything_loads() -> None:
    recipe = load_recipe(RECIPES / "optimised.yaml", {"packing": True})
    with pytest.raises(UsageError, match=r"batch\.packing: true, and 'ibm-granite.*36 of its 40 layers are recurrent"):
        preflight(inputs_of(recipe))
    unpacked = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch, packing=False))
    preflight(inputs_of(unpacked))
    llama = load_recipe(RECIPES / "optimised.yaml", {"packing": True, "model": "llama-3.2-3b"})
    preflight(inputs_of(llama))
