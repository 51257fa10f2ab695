"""The sizes of tiny models: of a configuration's field by its name, and what no name says, by family."""

from collections.abc import Mapping
from typing import Any


def _sizes() -> dict[str, int]:
    by_size = {
        64: (
            "hidden_size d_model n_embd embedding_size embedding_dim word_embed_proj_dim attention_hidden_size "
            "lru_width backbone_hidden_size"
        ),
        128: (
            "intermediate_size ffn_dim dim_ff dff ffn_hidden_size n_inner d_inner dense_intermediate_size "
            "intermediate_size_mlp shared_intermediate_size"
        ),
        32: (
            "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
            "expert_ffn_hidden_size shared_experts_intermediate_size kv_lora_rank q_lora_rank o_lora_rank "
            "sliding_window sliding_window_size window_size local_attention attention_window_size "
            "attention_chunk_size keep_window_size"
        ),
        16: (
            "head_dim swa_head_dim linear_head_dim kv_channels dim_head d_head v_head_dim attention_head_dim "
            "qk_head_dim index_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size "
            "state_size index_topk hidden_size_per_layer_input mamba_chunk_size chunk_size router_hidden_size "
            "index_block_size block_multiple_of"
        ),
        8: "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_dt_rank time_step_rank adapter_rank laurel_rank",
        4: (
            "num_attention_heads n_head n_heads attention_heads num_heads linear_num_heads linear_num_value_heads "
            "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts"
        ),
        2: (
            "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups index_n_heads "
            "linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k num_hidden_layers "
            "n_layer n_layers num_layers num_blocks num_layers_per_stack index_topk_blocks zero_expert_num"
        ),
        1: "n_group topk_group num_expert_group",
        512: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
        256: (
            "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
            "original_max_position_embeddings"
        ),
    }
    return {name: size for size, names in by_size.items() for name in names.split()}


# By the name of a field; a default that is smaller stays.
SIZES: Mapping[str, int] = _sizes()

_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16}
_EXPERTS = {"num_experts_per_tok": 2}
_ONE_DENSE = {"mlp_layer_types": ["dense", "sparse"]}
_BLT = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}

# By family: what its own default leaves open (None), what must fit together, and layers that no list of kinds names.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "aria_text": {"intermediate_size": 32},
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "blt": {
        "vocab_size": 260,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": {**_BLT, "vocab_size": 260},
        "encoder_config": {**_BLT, "hidden_size_global": 64},
        "decoder_config": {**_BLT, "hidden_size_global": 64},
        "global_config": _BLT,
    },
    "cohere2_moe": {**_ONE_DENSE, "prefix_dense_intermediate_size": 128},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": None},
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_EXPERTS, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "per_layer_config": {},
    },
    "ernie4_5_moe": {"moe_layer_end_index": 1},
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 128},
    "flint": {
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        **_MAMBA_2,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 64,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling2_text": _ONE_DENSE,
    "inkling_text": _ONE_DENSE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 1, 0],
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "moe_layers": [1, 2],
    },
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "minimax_m3_vl_text": {**_ONE_DENSE, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3": {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        **_EXPERTS,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 512,
        "split_ngram_parts": 4,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlstm": {"num_heads": 4},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 32},
}
