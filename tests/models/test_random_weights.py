"""Random weights are what `from_pretrained` makes: each tensor's dtype, and what starts at a constant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lowmem.models.random_weights import config_from, meta_model, random_model

CPU = torch.device("cpu")
# Biases in 4-bit layers (Qwen 2, GLM, gpt-oss, GPT-2), tensors kept in fp32, scans, tensors made on the host.
FAMILIES = ("diffllama", "falcon_h1", "glm4", "gpt2", "gpt_oss", "granitemoehybrid", "nemotron_h", "phi", "qwen2")


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = config_from(tiny(family))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=quantization, device_map={"": CPU}
    )
    made = random_model(meta_model(config, dtype, "auto"), dtype, quantization, CPU)
    here, there = tensors(made), tensors(loaded)
    assert {name: each.dtype for name, each in here.items()} == {name: each.dtype for name, each in there.items()}
    for name, tensor in there.items():
        if tensor.is_floating_point() and tensor.float().std(correction=0) == 0:
            assert torch.equal(here[name], tensor), name
