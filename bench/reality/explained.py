"""Bytes that the measured program keeps and a recipe does not, worked out from its description: no fitting."""

from qlora_lowmem.recipe import Recipe
from reality.rows import FITCHECK, FMS_LATER, PEFT, UNSLOTH, PublishedPeak


def explained_bytes(row: PublishedPeak) -> int:
    """What the measured run holds beside what a recipe's would; 0 where the description names nothing.

    - fitcheck: its loop holds the model's output through backward, so (batch, seq, vocabulary) logits, in the 16 bits
      of the model or, with NF4, in the fp32 that `prepare_model_for_kbit_training` made of it.
    - fms-acceleration with transformers 4.48: the same runs were published with 4.45, and the later figures are higher
      by the 16-bit logits, which from then on live beside their fp32 copy.
    - PEFT's script: the last step's output lives until the next one's forward ends: logits and key-value cache.
    - Unsloth's table: embeddings and LM head in fp32, as `prepare_model_for_kbit_training` leaves them (assumed: the
      description says Hugging Face's QLoRA and no more).
    """
    recipe, content = row.recipe, row.architecture
    logits = recipe.batch.batch_size * recipe.batch.max_seq_length * int(content["vocab_size"])
    if row.source == FITCHECK:
        return logits * (4 if recipe.quantization.load_in_4bit else 2)
    if row.source == FMS_LATER:
        return logits * 2
    if row.source == PEFT:
        return logits * 2 + _cache(recipe, content)
    if row.source == UNSLOTH:
        return 2 * int(content["vocab_size"]) * int(content["hidden_size"]) * 2
    return 0


def _cache(recipe: Recipe, content: dict[str, int]) -> int:
    """Keys and values of every layer, (batch, key-value heads, seq, head_dim) in 16 bits."""
    head = content["num_key_value_heads"] * content["head_dim"]
    tokens = recipe.batch.batch_size * recipe.batch.max_seq_length
    return 2 * content["num_hidden_layers"] * tokens * head * 2
