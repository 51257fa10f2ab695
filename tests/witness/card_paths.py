"""What the libraries choose on a GPU, chosen for tensors on the device `meta`: one substitution a line, each stated.

And what operators that are one call here take inside on a GPU (`temporaries`).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import bitsandbytes.backends.cuda.ops as bnb_cuda
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers.masking_utils as masking_utils
import trl.kernels.chunked_logprob as chunked
import trl.trainer.utils as trl_utils
from triton.runtime.jit import JITFunction


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 - flash attention takes fewer key heads as they are
) -> torch.Tensor:
    """PyTorch's order on sm_80 and later, where there is no mask: flash attention. Autocast casts its inputs."""
    assert attn_mask is None, "a batch without padding has no mask"
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def card_paths(capability: tuple[int, int], sm_count: int) -> Iterator[None]:
    """Inside, libraries take the paths that they take on a card of that compute capability."""
    autocast_enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_cuda(device: str | None) -> str:
        return "cuda" if device in (None, "meta") else device

    substitutions: list[tuple[Any, str, Any]] = [
        # TRL's loss: Triton kernels, which allocate nothing, and cuBLAS accumulating into its output.
        (chunked, "_use_triton", lambda _device: True),
        (trl_utils, "_use_triton", lambda _device: True),
        (chunked, "_addmm_fp32", lambda _acc, _a, _b: None),
        (JITFunction, "run", lambda _self, *_args, **_kwargs: None),
        # Every sample is of full length: no padding, no mask.
        (masking_utils, "fast_all", lambda _mask: True),
        (F, "scaled_dot_product_attention", _flash_attention),
        # What asks about autocast by a tensor's device means CUDA's.
        (torch, "is_autocast_enabled", lambda device=None: autocast_enabled(on_cuda(device))),
        (torch, "get_autocast_dtype", lambda device: autocast_dtype(on_cuda(device))),
        (torch.utils.checkpoint, "_infer_device_type", lambda *_args: "cuda"),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_args: True),
        # bitsandbytes chooses between its kernel and a dequantised weight by the card.
        (bnb_cuda, "_gpu_dispatch_props", lambda _index: (sm_count, *capability)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in substitutions]
    bnb_cuda._gemm_4bit_use_custom_cuda.cache_clear()
    for owner, name, value in substitutions:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        bnb_cuda._gemm_4bit_use_custom_cuda.cache_clear()


def temporaries(operator: str, args: tuple[Any, ...], result: Any) -> list[int]:
    """Bytes of what the operator allocates on a GPU and gives back before it returns, its result left out."""
    if operator == "bitsandbytes.gemm_4bit.default":
        return _dequantised_weight(*args[:3], blocksize=args[4])
    if operator == "aten._scaled_dot_product_flash_attention_backward.default":
        return _flash_backward(args[1], args[2])
    if operator == "aten._softmax_backward_data.default":
        return [result.numel() * result.element_size()]  # grad * output
    return []


def _dequantised_weight(hidden: torch.Tensor, _packed: torch.Tensor, shape: list[int], blocksize: int) -> list[int]:
    """`bitsandbytes/backends/cuda/ops.py`, `_dequant_linear_fallback`: the weight and its constants (twice) in full."""
    columns = hidden.shape[-1]
    rows = hidden.numel() // columns
    custom = rows <= bnb_cuda._gemm_4bit_custom_max_m and columns % blocksize == 0
    if custom and bnb_cuda._gemm_4bit_use_custom_cuda(0, hidden.dtype, rows, shape[0], columns):
        return []
    weights = math.prod(shape)
    return [weights * hidden.element_size(), weights // blocksize * 4]


def _flash_backward(query: torch.Tensor, key: torch.Tensor) -> list[int]:
    """`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, `mha_bwd`.

    fp32 sums of the queries' gradient and of the softmax; gradients of keys and values for every query head where
    there are fewer key heads. Lengths are rounded to 128, head dimensions to 32.
    """
    batch, heads, length, width = query.shape
    rounded_length, rounded_width = -(-length // 128) * 128, -(-width // 32) * 32
    pieces = [batch * heads * rounded_length * rounded_width * 4, batch * heads * rounded_length * 4]
    if key.shape[1] != heads:
        pieces += [batch * heads * key.shape[2] * width * key.element_size()] * 2
    return pieces
