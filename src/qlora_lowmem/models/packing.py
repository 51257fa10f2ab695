"""May samples be packed into one row with this model? Only where none of them sees the one packed before it."""

from typing import Any

# Model types whose attention keeps packed samples apart, with sdpa and with eager: transformers builds their masks from
# the samples' positions. tests/models/test_packing.py runs each of them, packed and one by one.
KEEPS_APART = (
    "gemma",
    "gemma3_text",
    "granite",
    "granitemoe",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
_ATTENTION = ("full_attention", "sliding_attention", "attention")


def why_not_packed(config: Any) -> str | None:
    """Why a model of this configuration cannot train on packed samples; None if it can.

    A recurrent layer's state runs on from one sample into the next unless a kernel is told where samples end
    (`seq_idx`). transformers 5.23 refuses that in the first step without the packages causal_conv1d and mamba_ssm
    (integrations/hub_kernels.py), and with mamba_ssm a model in 4 bits fails: the kernel takes `out_proj.weight` as it
    is stored. The attention masks of granitemoehybrid are built without the samples' positions
    (`GraniteMoeHybridModel.forward`), so without a word each sample would attend to those before it.
    """
    text = config.get_text_config()
    content = text.to_dict()
    layers = content.get("layer_types") or content.get("layers_block_type") or []
    recurrent = sum(layer not in _ATTENTION for layer in layers)
    if recurrent:
        return (
            f"{recurrent} of its {len(layers)} layers are recurrent ({text.model_type}), and their state would run on "
            "from each packed sample into the next"
        )
    if text.model_type == "granitemoehybrid":
        return "transformers builds the attention masks of granitemoehybrid without looking where packed samples end"
    if text.model_type not in KEEPS_APART:
        return f"whether {text.model_type} keeps packed samples apart is not tested; these do: {', '.join(KEEPS_APART)}"
    return None
