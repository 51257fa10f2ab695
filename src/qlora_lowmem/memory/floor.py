"""The floor: bytes that no method of training this recipe avoids, for a peak to be held against."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.memory.owners import quantisation_tensors


@dataclass(frozen=True)
class Floor:
    """Bytes by part; `total` is the floor.

    Attributes:
        weights: the frozen base as stored: 4-bit weights, their constants, embeddings, norms, buffers.
        adapters: what is trained, and the optimizer's state of it.
        residual: two residual tensors of (batch, seq, hidden): a layer's input and its output (or their gradients).
    """

    weights: int
    adapters: int
    residual: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.adapters + self.residual


def floor_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, residual_elements: int) -> Floor:
    """Count the floor of a job whose optimizer has taken a step.

    Args:
        model: with its adapters; each tensor counts once, however many modules share it.
        optimizer: its state tensors count with the adapters; scalars (Adam's step) as what they are.
        residual_elements: batch x seq x hidden, in the dtype of the model's embeddings.
    """
    seen: set[int] = set()
    base, trained = 0, 0
    states = [getattr(module, "quant_state", None) for module in model.modules()]  # bitsandbytes' Linear4bit has one
    for parameter in model.parameters():
        size = _bytes(parameter, seen)
        if parameter.requires_grad:
            trained += size
        else:
            base += size
            states.append(getattr(parameter, "quant_state", None))  # that of Params4bit; FSDP2's shards have lost it
    for state in states:
        base += sum(_bytes(tensor, seen) for _, tensor in quantisation_tensors(state)) if state is not None else 0
    base += sum(_bytes(buffer, seen) for buffer in model.buffers())
    if optimizer is not None:
        for values in optimizer.state.values():
            trained += sum(_bytes(value, seen) for value in values.values() if isinstance(value, Tensor))
    return Floor(base, trained, 2 * residual_elements * _embedding_bytes(model))


def _bytes(tensor: Any, seen: set[int]) -> int:
    if hasattr(tensor, "to_local"):  # a DTensor, which FSDP2 shards over cards: this one's part counts
        tensor = tensor.to_local()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return int(tensor.numel() * tensor.element_size())


def _embedding_bytes(model: Any) -> int:
    """Bytes of an element of the residual stream: that of the norms, which are never quantised."""
    dtypes = [p.dtype for name, p in model.named_parameters() if "norm" in name and p.dtype.is_floating_point]
    return dtypes[0].itemsize if dtypes else 2
