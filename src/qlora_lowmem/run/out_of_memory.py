"""Is this error memory that ran out, whose (the card's or the host's), and what is told and saved then.

PyTorch's allocator has an error of its own. What CUDA and its libraries allocate past it comes as another: the context
on a card that is full, kernels as they are loaded, the handles and workspaces of cuBLAS and cuDNN, and page-locked host
memory, for which CUDA has the same words as for the card's.
"""

import linecache
import re
import traceback
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_lowmem.errors import DoesNotFitError
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run_folder.checkpoints import NotSavedError, newest_complete

# cudaErrorMemoryAllocation's words (driver_types.h), alone and in Triton's and NCCL's messages; the libraries' own.
_CARD = re.compile(
    r"CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|Error 2: out of memory|"
    r"Triton Error \[CUDA\]: out of memory|Cuda failure( 2)? '?out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
)
_HOST = re.compile(r"DefaultCPUAllocator|CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED|Cannot allocate memory")
_PINS = re.compile(r"pin_memory|cudaHostAlloc|pin memory thread")


class OutOfGpuMemoryError(DoesNotFitError):
    """The card's memory ran out: the phase in which it came, the peaks until then, the checkpoint that stands."""

    def __init__(self, phase: str, torch_message: str, profile: MemoryProfile, checkpoint: Path | None = None) -> None:
        super().__init__(f"out of GPU memory in phase {phase!r}: {torch_message}")
        self.phase = phase
        self.torch_message = torch_message
        self.profile = profile
        self.checkpoint = checkpoint


class OutOfHostMemoryError(DoesNotFitError):
    """The host's memory ran out, page-locked or not; no other card would help."""

    def __init__(self, recipe: Recipe, phase: str, message: str, checkpoint: Path | None = None) -> None:
        taken_by = {
            "lean.checkpoints (set it to segments)": recipe.lean.lean and recipe.lean.checkpoints == "host",
            "memory.activation_offloading (set it to false)": recipe.memory.activation_offloading,
            "dataloader.pin_memory (set it to false)": recipe.dataloader.pin_memory,
            "run.device: cpu (the whole job is there)": recipe.run.device == "cpu",
        }
        asks = [words for words, set_so in taken_by.items() if set_so]
        kept = f" {checkpoint} is whole: the same command goes on from there." if checkpoint else ""
        super().__init__(
            f"out of host memory in phase {phase!r}: {message}. This is the machine's own memory, not the card's"
            f"{'; it is asked for by ' + ', '.join(asks) if asks else ''}. Ask for less, or end other programs.{kept}"
        )


def raise_if_out_of_memory(
    error: BaseException, recipe: Recipe, phase: str, recorder: Recorder | None, trainer: Any = None
) -> None:
    """Raise what is told of a job's error in its place, if it is memory that ran out.

    Args:
        phase: where it came from, if the recorder does not know better.
        recorder: None on a CPU.
        trainer: saves its last good step; None where nothing is saved.

    Raises:
        OutOfGpuMemoryError, OutOfHostMemoryError: memory ran out.
    """
    whose = whose_memory(error)
    if whose is None or (whose == "card" and recorder is None):
        return
    phase = (recorder.running_phase if recorder is not None else None) or phase
    profile = recorder.profile() if recorder is not None else None  # which ends the phase
    saved = _rescued(trainer, error) if trainer is not None else None
    if whose == "host" or profile is None:
        raise OutOfHostMemoryError(recipe, phase, first_words(error), saved) from error
    raise OutOfGpuMemoryError(phase, first_words(error), profile, saved) from error


def _rescued(trainer: Any, error: BaseException) -> Path | None:
    """The checkpoint that stands after running out of memory, made now where a good step is not saved yet."""
    traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors
    saved: Path | None = None
    try:
        saved = trainer.rescue()
    except (RuntimeError, MemoryError, NotSavedError) as again:  # that there is too little memory is what to tell
        if not isinstance(again, NotSavedError) and not whose_memory(again):
            raise
    return saved or newest_complete(Path(str(trainer.args.output_dir))).checkpoint


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


def first_words(error: BaseException) -> str:
    """The error's message up to PyTorch's advice on its allocator or on debugging CUDA, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r" If reserved but unallocated| CUDA kernel errors might| Search for `cuda", text)[0]


def _last_statements(error: BaseException) -> str:
    """The innermost Python statements, PyTorch's own wrappers among them: CUDA does not say what it was asked for."""
    statements = []
    for frame in traceback.extract_tb(error.__traceback__)[-3:]:
        first, last = frame.lineno or 1, frame.end_lineno or frame.lineno or 1
        statements += linecache.getlines(frame.filename)[first - 1 : last]
    return "".join(statements)
