"""Llama and the families built as it is, in tiles: causal attention and a SwiGLU, each after an RMSNorm.

Mirrors `LlamaDecoderLayer.forward`, `LlamaModel.forward` and `LlamaForCausalLM.forward`. What its relatives add is read
from their modules: biases (Qwen 2), norms of heads (Qwen 3), layers without rotation (SmolLM 3), multipliers (Granite).
"""

import functools
from typing import Any

from torch import Tensor

from qlora_lowmem.lean.decoder import AttentionLayer, Family, SequenceInputs
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.swiglu import swiglu_of
from qlora_lowmem.lean.tiles import TiledLayer


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    update: Tensor = mlp.down_proj(swiglu_of(mlp.gate_proj(x), mlp.up_proj(x)))
    return update


def _tiled_layer(layer: Any, inputs: SequenceInputs, options: LeanOptions) -> TiledLayer:
    del options
    return AttentionLayer(layer, inputs, layer.self_attn, functools.partial(_feed_forward, layer.mlp), (layer.mlp,))


def _window(config: Any) -> int | None:
    # Mistral has one window for all layers where its config names no types; the others list a type a layer.
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if slides else None


# Packed samples are told apart by their positions, which are given in no other case: the model's own masks keep them.
FAMILY = Family(
    _tiled_layer,
    backbone_output="BaseModelOutputWithPast",
    causal_output="CausalLMOutputWithPast",
    window=_window,
    plain_keywords=("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"),
)
