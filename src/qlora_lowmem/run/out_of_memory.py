"""Is this error memory that ran out, and whose: the card's or the host's?

PyTorch's allocator has an error of its own. What CUDA and its libraries allocate past it comes as another: the context
on a card that is full, kernels as they are loaded, the handles and workspaces of cuBLAS and cuDNN, and page-locked host
memory, for which CUDA has the same words as for the card's.
"""

import linecache
import re
import traceback
from typing import Literal

import torch

# cudaErrorMemoryAllocation's words (driver_types.h), alone and in Triton's and NCCL's messages; the libraries' own.
_CARD = re.compile(
    r"CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|Error 2: out of memory|"
    r"Triton Error \[CUDA\]: out of memory|Cuda failure( 2)? '?out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
)
_HOST = re.compile(r"DefaultCPUAllocator|CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED|Cannot allocate memory")
_PINS = re.compile(r"pin_memory|cudaHostAlloc|pin memory thread")
_FRAMES = 3


def whose_memory(error: BaseException) -> Literal["card", "host"] | None:
    """Whose memory ran out; None if the error is another."""
    if isinstance(error, torch.OutOfMemoryError):
        return "card"
    if isinstance(error, MemoryError):
        return "host"
    if not isinstance(error, RuntimeError):  # torch.AcceleratorError is one
        return None
    text = str(error)
    if _HOST.search(text):
        return "host"
    if not _CARD.search(text):
        return None
    return "host" if _PINS.search(text) or _PINS.search(_last_statements(error)) else "card"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the card's or the host's."""
    return whose_memory(error) is not None


def first_words(error: BaseException) -> str:
    """The error's message up to PyTorch's advice on its allocator or on debugging CUDA, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r" If reserved but unallocated| CUDA kernel errors might| Search for `cuda", text)[0]


def _last_statements(error: BaseException) -> str:
    """The innermost Python statements, PyTorch's own wrappers among them: CUDA does not say what it was asked for."""
    statements = []
    for frame in traceback.extract_tb(error.__traceback__)[-_FRAMES:]:
        first, last = frame.lineno or 1, frame.end_lineno or frame.lineno or 1
        statements += linecache.getlines(frame.filename)[first - 1 : last]
    return "".join(statements)
