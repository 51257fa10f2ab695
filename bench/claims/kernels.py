"""In the worker: which attention kernel PyTorch picks on the card at hand, and what one call keeps for backward."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_KERNELS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
    "aten::_scaled_dot_product_attention_math": "math",
}


class _Watch(TorchDispatchMode):
    """Remembers the fused attention kernels that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = _KERNELS.get(func._schema.name)
        if kernel is not None:
            self.seen.append(kernel)
        return func(*args, **(kwargs or {}))


class _Layer(torch.nn.Module):
    """What transformers' attention function asks of a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def attention_kernel(heads: int, key_value_heads: int, head_dim: int, length: int) -> str:
    """The kernel behind transformers' `sdpa` for one causal layer without padding; `math` if none is fused.

    Queries are (1, heads, length, head_dim), in bf16 where the card has it, else in fp16.
    """
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(0) >= (8, 0) else torch.float16

    def tensor(count: int) -> torch.Tensor:
        return torch.empty(1, count, length, head_dim, dtype=dtype, device="cuda", requires_grad=True)

    with _Watch() as watch:
        sdpa_attention_forward(
            _Layer(heads // key_value_heads),
            tensor(heads),
            tensor(key_value_heads),
            tensor(key_value_heads),
            attention_mask=None,
        )
    return watch.seen[0] if watch.seen else "math"
