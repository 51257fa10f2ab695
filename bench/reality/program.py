"""In the worker: fitcheck's measured loop, stated in our own words.

The base is in fp16, or in NF4 without double quantisation and then through PEFT's `prepare_model_for_kbit_training`
(all else in fp32). LoRA in fp32, AdamW, no autocast, no loss scaling, no clipping. One batch of random tokens is its
own labels; the model's output stays alive through backward; gradients are set to None. The peak is the second step's.
"""

import contextlib
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BitsAndBytesConfig

from qlora_lowmem.models.random_weights import config_from, meta_model, random_model


def peak(
    architecture: dict[str, Any], rank: int, targets: list[str], batch: int, length: int, attention: str, nf4: bool
) -> dict[str, int]:
    """`loaded`, `allocated` and `reserved` bytes: after loading, and the peaks of the second step."""
    quantization = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
        if nf4
        else None
    )
    on_meta = meta_model(config_from(architecture), torch.float16, attention)
    base: Any = random_model(on_meta, torch.float16, quantization, torch.device("cuda", 0))
    base.config.use_cache = False
    if nf4:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    loaded = torch.cuda.memory_allocated()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, architecture["vocab_size"], (batch, length), device="cuda")
    with _memory_efficient() if attention == "sdpa" else contextlib.nullcontext():
        _step(model, optimizer, tokens)
        torch.cuda.reset_peak_memory_stats()
        _step(model, optimizer, tokens)
    return {
        "loaded": loaded,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    optimizer.step()


@contextlib.contextmanager
def _memory_efficient() -> Any:
    """The memory-efficient kernel alone, with keys and values repeated for it, as the measured program sees to."""
    attend = functional.scaled_dot_product_attention

    def repeated(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        groups = query.size(-3) // key.size(-3)
        if groups > 1:
            key, value = (each.repeat_interleave(groups, dim=-3) for each in (key, value))
            kwargs.pop("enable_gqa", None)
        return attend(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = repeated
    try:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            yield
    finally:
        functional.scaled_dot_product_attention = attend
