"""Beside the libraries it runs under: bitsandbytes' 4-bit layers, TRL's fused LM head."""

import copy
from collections.abc import Callable
from typing import Literal

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

from qlora_lowmem.lean import LeanOptions, apply_lean

from .conftest import TARGETS, VOCABULARY, batch_of, hybrid, relative

SMALL = LeanOptions(tile_length=16, feed_forward_tile_length=7, loss_tile_bytes=VOCABULARY * 4 * 10)


def quantise(model: nn.Module) -> nn.Module:
    """Frozen linear layers of an adapted model in NF4 with double quantisation, inside PEFT's 4-bit LoRA layers."""
    base = model.unload()
    for name, linear in list(base.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            packed, state = bnb.functional.quantize_4bit(
                linear.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, device="meta"
            )
            layer.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
            layer.quant_state = state
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer)
    base.is_loaded_in_4bit = True  # as from_pretrained says, and PEFT reads
    return get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).train()


def test_four_bit_linear_layers(assert_same_step: Callable[..., None]) -> None:
    plain = quantise(hybrid("mam", hidden_size=64, mamba_n_heads=8, shared_intermediate_size=64))
    assert any(type(m).__name__ == "Linear4bit" and "peft" in type(m).__module__ for m in plain.modules())
    assert_same_step(plain, SMALL, batch_of(2, 40))


@pytest.mark.parametrize("padding", [None, "right"])
def test_fused_lm_head_of_trl(padding: str | None) -> None:
    plain = hybrid("mam")
    add_fused_lm_head(plain.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    lean = copy.deepcopy(plain)
    apply_lean(lean, SMALL)
    inputs = batch_of(2, 40, padding)
    outputs = []
    for model in (plain, lean):
        output = model(**inputs, fused_lm_head=True, use_cache=False)
        (output.log_probs.exp() * output.log_probs).sum().backward()
        outputs.append(output)
    theirs, ours = outputs
    assert type(ours) is type(theirs)
    assert relative(ours.loss, theirs.loss) < 1e-5
    assert relative(ours.log_probs, theirs.log_probs) < 1e-5
    assert relative(ours.entropy, theirs.entropy) < 1e-5
    assert torch.equal(ours.is_top1, theirs.is_top1)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-8


def llama() -> nn.Module:
    """A model that is no hybrid, with LoRA, under TRL's fused LM head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(r=4, lora_alpha=1, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).train()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_fused_lm_head_of_a_model_that_is_no_hybrid(bits: Literal[4, 8] | None) -> None:
    """Quantised embeddings have no weight that TRL's head could multiply by: the table's own words are the truth."""
    lean = llama()
    apply_lean(lean, LeanOptions(loss_tile_bytes=VOCABULARY * 4 * 10, quantised_embeddings=bits))
    plain = llama()
    if bits is not None:
        table = lean.get_input_embeddings().table
        with torch.no_grad():
            plain.get_input_embeddings().weight.copy_(table.rows(torch.arange(VOCABULARY)))
    inputs = batch_of(2, 40, "right")
    theirs, ours = (model(**inputs, fused_lm_head=True, use_cache=False) for model in (plain, lean))
    for output in (theirs, ours):
        (output.log_probs.exp() * output.log_probs).sum().backward()
    assert type(ours) is type(theirs)
    for name in ("loss", "log_probs", "entropy"):
        assert relative(getattr(ours, name), getattr(theirs, name)) < 1e-5, name
    assert torch.equal(ours.is_top1, theirs.is_top1)
    gradients = [{n: p.grad for n, p in model.named_parameters() if "lora_" in n} for model in (plain, lean)]
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 1e-5, name


def test_a_head_that_trl_adds_later_gets_lean_hidden_states() -> None:
    plain = hybrid("mam")
    lean = copy.deepcopy(plain)
    apply_lean(lean, SMALL)
    add_fused_lm_head(lean.get_base_model())
    inputs = batch_of(2, 40)
    found = lean(**inputs, fused_lm_head=True, use_cache=False).loss
    assert relative(found, plain(**inputs, use_cache=False).loss) < 1e-5
    found.backward()
