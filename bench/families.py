"""Every decoder-only family that transformers knows, as a tiny model that has each of its kinds of layers.

A family is a `model_type`. Its configuration is its class's default with each size replaced by a small one of the same
name; of lists with an entry a layer, the first layer of each kind is kept.
"""

from collections.abc import Sequence
from typing import Any

from family_sizes import SIZES, SPECIAL
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# Decoders of other things than text, or of a text that another model read.
_OF_OTHER_MODELS = {
    "bert-generation": "the decoder of an encoder-decoder",
    "gemma4_assistant": "drafts tokens from the keys of a larger model",
    "gemma4_unified_assistant": "drafts tokens from the keys of a larger model",
    "git": "reads images",
    "moshi": "speaks: a decoder of audio",
    "phi4_multimodal": "reads images and sound; its text is a Phi-3",
    "musicgen": "a decoder of music",
    "musicgen_melody": "a decoder of music",
    "trocr": "the decoder of an encoder-decoder",
}

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# Per layer, and a size.
_SMALL_LISTS = {"num_attention_heads_per_layer": 4}


def families() -> list[str]:
    """Model types of the decoder-only language models, by name."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if why_none(name) is None]


def why_none(name: str) -> str | None:
    """Why a model type is no decoder-only language model; None where it is one."""
    if name in _OF_OTHER_MODELS:
        return _OF_OTHER_MODELS[name]
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder like BERT, for masked tokens"
    config = AutoConfig.for_model(name)
    if config.is_encoder_decoder or name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "half of an encoder-decoder"
    inner = config.get_text_config()
    if inner is not config:
        return f"a wrapper around {inner.model_type}"
    return None


def tiny(name: str) -> dict[str, Any]:
    """The content of a tiny model's `config.json`."""
    default = AutoConfig.for_model(name).to_dict()
    special = SPECIAL.get(name, {})
    changes: dict[str, Any] = {
        key: small for key, small in SIZES.items() if isinstance(default.get(key), int) and default[key] > small
    }
    changes |= {
        key: 1 for key, value in default.items() if key.endswith("_token_id") and isinstance(value, int) and value > 511
    }
    if "qk_rope_head_dim" in default:  # latent attention: every head has keys and values of its own
        changes["num_key_value_heads"] = changes["num_attention_heads"]
        if default.get("head_dim") == default["qk_rope_head_dim"]:
            changes["head_dim"] = changes["qk_rope_head_dim"]
    layers = next((default[key] for key in _LAYERS if key in default), 0)
    by_layer = {key: value for key, value in default.items() if isinstance(value, list) and len(value) == layers}
    if by_layer and not special.keys() & set(_LAYERS):
        kept = _first_of_each_kind(list(by_layer.values()))
        changes |= {key: [value[number] for number in kept] for key, value in by_layer.items()}
        changes |= {key: [small] * len(kept) for key, small in _SMALL_LISTS.items() if key in by_layer}
        changes |= {key: len(kept) for key in _LAYERS if key in default}
    return AutoConfig.for_model(name, **(changes | dict(special))).to_dict()


def _first_of_each_kind(lists: Sequence[Sequence[Any]]) -> list[int]:
    """Numbers of layers, at least two."""
    kinds: dict[str, int] = {}
    for number, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(kind), number)
    kept = sorted(kinds.values())
    return kept if len(kept) > 1 else [0, 1]
