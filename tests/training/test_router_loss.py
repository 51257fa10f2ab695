"""Fused or full, the routers' loss of a mixture weighs the same in a step, however many micro-batches the step has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers import without_kernels
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of

_BY_SIZE = {
    512: "vocab_size",
    128: "intermediate_size shared_intermediate_size intermediate_size_mlp",
    64: "hidden_size",
    32: "moe_intermediate_size shared_expert_intermediate_size sliding_window q_lora_rank o_lora_rank",
    16: "head_dim mamba_d_state linear_key_head_dim linear_value_head_dim index_head_dim index_topk index_block_size "
    "mamba_chunk_size",
    8: "mamba_dt_rank rotary_dim qk_rope_head_dim",
    4: "num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads "
    "o_groups",
    2: "moe_k num_key_value_heads linear_num_key_heads num_experts_per_tok num_hidden_layers index_n_heads "
    "index_topk_blocks",
}
_SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_FULL_AND_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
_QWEN_4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
_QWEN_4 |= {"indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_embed_dim": 64, "ngram_vocab_size_base": 512}
# Families with a weight for their routers' loss, and what of a tiny one no name of a field says.
ROUTED: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"num_experts": 16, "num_experts_per_tok": 4, "is_moe": True},
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": [0], **_FULL_AND_SLIDING},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _FULL_AND_SLIDING,
    "mellum": _FULL_AND_SLIDING,
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen4_exp_text": {**_QWEN_4, "split_ngram_parts": 4},
}  # fmt: skip
TARGETS = {"deepseek_v4": "q_a_proj", "phimoe": "attention"}
NO_ROUTER_LOSS = ("doge", "granitemoehybrid")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ROUTED)
def test_fused_is_full(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, accumulation: int
) -> None:
    """With a weight of 5 the routers' loss is most of it: a mean of 1 or so over the experts of each token."""
    default = CONFIG_MAPPING[family]().to_dict()
    small = {name: min(default[name], size) for name, size in _SIZES.items() if isinstance(default.get(name), int)}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "router_aux_loss_coef": 5.0}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | small | ROUTED[family]))
    without_kernels(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[family]].__module__, monkeypatch)
    losses = {}
    for loss in ("fused", "full"):
        recipe = tiny_recipe(
            loss,
            model=str(tmp_path),
            load_in_4bit=False,
            attention="eager",
            target_modules=TARGETS.get(family, "all-linear"),
            lora_dropout=0.0,
            learning_rate=0.01,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            loss=loss,
        )
        losses[loss] = execute(inputs_of(recipe), output_dir=Path(recipe.run.output_dir), save=False).losses
    assert losses["full"] == pytest.approx(losses["fused"], rel=1e-5)
    assert (losses["full"][0] > 8) == (family not in NO_ROUTER_LOSS)  # ln(512) = 6.2


def test_every_family_with_a_routers_loss_is_tried() -> None:
    broken = ("gemma4_assistant", "llama4", "llama4_text")  # contradictory defaults; a weight, and no loss in the model
    families = [each for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if each not in broken]
    configs = {each: CONFIG_MAPPING[each]() for each in families}
    assert {each for each, config in configs.items() if hasattr(config, "router_aux_loss_coef")} == set(ROUTED)
