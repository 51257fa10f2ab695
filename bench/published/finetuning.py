"""PEFT's method comparison as one process: Llama-3.2-3B in bf16, batch 4, AdamW, no checkpointing.

The published script sorts batches longest first, so one step decides: a short step that creates the optimizer's state,
`empty_cache()` (the script does so after every tenth step), and one step with the longest batch. Its padded length is
not published: it is fitted on the first row and used for all of them.
"""

from typing import Any

import torch
import transformers.masking_utils
from peft import get_peft_config, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lowmem.models.random_weights import config_from
from qlora_lowmem.models.sources import architecture

BATCH = 4
SHORT_LENGTH = 64
GRADIENT_NORM = 1.0


def peak_reserved(peft_config: dict[str, Any], longest_length: int) -> dict[str, int]:
    """The whole process' `torch.cuda.max_memory_reserved()` less what the first small module took, in bytes.

    Also the number of trained parameters, which is published beside it.
    """
    # Values do not exist on a virtual GPU, so whether a batch has padding is said here: it has.
    transformers.masking_utils.fast_all = lambda _mask: False
    probe = nn.Linear(1, 1).to("cuda")
    before = torch.cuda.max_memory_reserved()
    model = _model(peft_config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()
    output, loss = _step(model, optimizer, SHORT_LENGTH)
    torch.cuda.empty_cache()
    # `output` lives until the next one replaces it: logits, and the key-value cache of a model whose `use_cache` is on.
    output, loss = _step(model, optimizer, longest_length)
    del output, loss, probe
    return {
        "reserved": torch.cuda.max_memory_reserved() - before,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
    }


def _model(peft_config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config_from(architecture("llama-3.2-3b")), dtype=torch.bfloat16)
    base = base.to_empty(device="cuda")
    base.tie_weights()
    return get_peft_model(base, get_peft_config(dict(peft_config)))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, length: int) -> tuple[Any, torch.Tensor]:
    tokens = torch.zeros(BATCH, length, dtype=torch.long).to("cuda")
    mask = torch.ones(BATCH, length, dtype=torch.long).to("cuda")
    labels = tokens.clone()
    for row in range(BATCH):
        labels[row, length - row :] = -100
    items = mask.sum().item()
    optimizer.zero_grad()
    output = model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=items)
    loss = output.loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    return output, loss
