"""Whose decoder layers run in tiles: asked by `apply_lean` of a model, and by plans of a configuration. And which file
of this package holds which kind of memory: asked by whoever attributes a peak to code.

Imports nothing heavy, so that a plan and the checks of a recipe can ask before torch is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class Family:
    """Models whose layers run in tiles. The defaults are Llama's, and those of its relatives.

    Attributes:
        causal_class: their class in transformers.
        backbone_output, causal_output: classes of transformers' `modeling_outputs` that their forwards return.
        plain_keywords: keywords whose calls take the decoder's own forward. Llama's packed samples are told apart by
            their positions, which are given in no other case: the model's own masks keep them.
        silu: what in tiles computes with SiLU.
    """

    causal_class: str
    backbone_output: str = "BaseModelOutputWithPast"
    causal_output: str = "CausalLMOutputWithPast"
    plain_keywords: tuple[str, ...] = ("position_ids", *_PACKED)
    silu: str = "the feed-forward part in tiles is a SwiGLU"


_HYBRID = ("MoeModelOutputWithPast", "MoeCausalLMOutputWithPast", _PACKED, "the convolution in tiles applies SiLU")

# By `model_type`, as `config.json` names it.
TILED_FAMILIES = {
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", *_HYBRID),
    "granite": Family("GraniteForCausalLM"),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
}


def why_not_tiles(family: Family, config: Mapping[str, Any]) -> str | None:
    """What in a model's configuration (`config.json`, or a configuration's `to_dict`) its layers in tiles do not know.

    What a file leaves out is what transformers takes then: SiLU, and no dropout.
    """
    activation, dropout = config.get("hidden_act", "silu"), config.get("attention_dropout")
    if activation != "silu":
        return f"hidden_act={activation!r}: {family.silu}"
    if dropout:
        return f"attention_dropout={dropout}: attention by blocks of keys has no dropout; set it to 0"
    return None


def takes_tiles(config: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration runs its layers in tiles; False where it names no `model_type`."""
    family = TILED_FAMILIES.get(str(config.get("model_type")))
    return family is not None and why_not_tiles(family, config) is None


Holding = Literal["mamba", "attention", "mlp", "norm", "loss", "checkpoints"]

# What a tensor made by the code of a file is for, every file of this package. None: code that calls other files', or
# whose tensors belong to what calls it.
HOLDS: Mapping[str, Holding | None] = {
    "__init__.py": None,
    "adapters.py": None,
    "apply.py": None,
    "attention.py": "attention",
    "checkpointing.py": "checkpoints",
    "convolution.py": "mamba",
    "decoder.py": None,
    "embeddings.py": None,
    "families.py": None,
    "layers.py": None,
    "linear4bit.py": None,
    "loss.py": "loss",
    "norms.py": "norm",
    "options.py": None,
    "scan.py": "mamba",
    "scan_chunks.py": "mamba",
    "scan_triton.py": "mamba",
    "swiglu.py": "mlp",
    "tiles.py": None,
    "token_rows.py": None,
}
