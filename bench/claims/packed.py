"""In the worker: one packed row, as TRL makes it, through transformers' own forward of a full-size 4-bit model."""

import torch
from transformers import BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_lowmem.models.random_weights import config_from, meta_model, random_model
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.models.targets import why_not_packed


def packed_forward(name: str, length: int, samples: int) -> dict[str, str | None]:
    """`samples` of equal length in one (1, length) row, with what TRL's collator says of where each begins.

    Returns:
        `error`: what transformers refused it with; None if it ran. `mixed`: why a sample would see another one; None
        if none does.
    """
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    on_meta = meta_model(config_from(architecture(name)), torch.bfloat16, "sdpa")
    model = random_model(on_meta, torch.bfloat16, quantization, torch.device("cuda", 0))
    row = {"input_ids": [0] * length, "seq_lengths": [length // samples] * samples}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    tensors = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    try:
        with torch.no_grad():
            model(**tensors, use_cache=False)
    except ValueError as error:
        return {"error": f"ValueError: {' '.join(str(error).split())}", "mixed": why_not_packed(model.config)}
    return {"error": None, "mixed": why_not_packed(model.config)}
