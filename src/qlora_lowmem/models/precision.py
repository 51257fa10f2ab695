"""Which floating-point formats a job computes in, given its device."""

from dataclasses import dataclass

import torch

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """`compute`: of the base model and autocast. `adapter`: of the LoRA weights, and of Adam's state unless the recipe
    gives it a dtype of its own."""

    compute: torch.dtype
    adapter: torch.dtype

    @property
    def loss_scaling(self) -> bool:
        """fp16 gradients underflow without a scaled loss; PyTorch's scaler then needs fp32 adapters."""
        return self.compute is torch.float16


def choose_precision(recipe: Recipe, device: str, supports_bf16: bool) -> Precision:
    """Resolve `auto`: bf16 where the device has it, fp16 with loss scaling on Turing, fp32 on a CPU.

    bf16 adapters follow QLoRA (Dettmers et al. 2023, section 3) and TRL; with fp16 they stay fp32, because PyTorch's
    gradient scaler unscales fp32 gradients only.

    Raises:
        UsageError: bf16 asked of a card without it, or bf16 adapters with an fp16 base.
    """
    asked = recipe.quantization.compute_dtype
    if asked == "auto":
        asked = "fp32" if device == "cpu" else "bf16" if supports_bf16 else "fp16"
    if asked == "bf16" and device != "cpu" and not supports_bf16:
        raise UsageError(
            "quantization.compute_dtype: 'bf16' needs compute capability 8.0 or higher (Ampere), and this card is "
            "older. Use 'auto' or 'fp16'"
        )
    if asked == "fp16" and device == "cpu":
        raise UsageError("quantization.compute_dtype: 'fp16' is for GPUs. On a CPU use 'auto', 'fp32' or 'bf16'")
    compute = _DTYPES[asked]
    adapter = recipe.lora.adapter_dtype
    if adapter == "auto":
        adapter = "bf16" if compute is torch.bfloat16 else "fp32"
    if adapter == "bf16" and compute is torch.float16:
        raise UsageError(
            "lora.adapter_dtype: 'bf16' does not go with an fp16 base, whose gradient scaler needs fp32 adapters. "
            "Use 'auto' or 'fp32'"
        )
    return Precision(compute=compute, adapter=_DTYPES[adapter])
