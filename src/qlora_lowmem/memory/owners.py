"""Which tensors are alive and what they are: parameters, quantisation state, gradients, optimizer state.

A tensor is known by the address of its storage, which is the address of the allocator's block. No tensor is held.

And the floor: bytes of them that no method of training avoids, for a peak to be held against.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.memory.kinds import Namer


@dataclass(frozen=True, slots=True)
class Owner:
    """A named tensor.

    Attributes:
        kind: as in `kinds.KINDS`.
        name: of the parameter or buffer, or of what belongs to it.
        layout: dtype and shape, `bfloat16 (100352, 1536)`.
    """

    kind: str
    name: str
    layout: str


Found = Iterator[tuple[int, Owner]]  # addresses and owners; one address may come twice


@dataclass(frozen=True)
class Owners:
    """Finds tensors on one CUDA device, and names them as `namer` does."""

    namer: Namer
    device: int = 0

    def weights(self, model: nn.Module, prefix: str = "") -> Found:
        """Every parameter and buffer of `model`, and the quantisation state of its 4-bit weights."""
        for own, parameter in model.named_parameters():
            name = prefix + own
            state = getattr(parameter, "quant_state", None)  # only bitsandbytes' Params4bit has one
            if state is not None:
                yield from self._of(parameter, "weights_4bit", name)
                for part, tensor in quantisation_tensors(state):
                    yield from self._of(tensor, "quantisation", name, f".quant_state.{part}")
            else:
                kind = "adapters" if self.namer.is_adapter(name, parameter) else self.namer.weights
                yield from self._of(parameter, kind, name)
        for own, buffer in model.named_buffers():
            yield from self._of(buffer, self.namer.weights, prefix + own)

    def gradients(self, model: nn.Module, prefix: str = "") -> Found:
        """Every gradient that parameters hold now."""
        for own, parameter in model.named_parameters():
            yield from self.gradient(prefix + own, parameter)

    def gradient(self, name: str, parameter: nn.Parameter) -> Found:
        """The gradient that one parameter holds now, if any."""
        if parameter.grad is not None:
            yield from self._of(parameter.grad, "gradients", name, ".grad")

    def optimizer_state(self, optimizer: torch.optim.Optimizer | None, names: Mapping[int, str]) -> Found:
        """Every tensor of the optimizer's state; `names` are those of parameters by their id."""
        for parameter, state in optimizer.state.items() if optimizer is not None else ():
            for key, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor):
                    yield from self._of(value, "optimizer", names.get(id(parameter), ""), f".{key}")

    def _of(self, tensor: Tensor, kind: str, name: str, part: str = "") -> Found:
        if tensor.is_cuda and tensor.device.index == self.device and tensor.untyped_storage().nbytes():
            layout = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            yield tensor.untyped_storage().data_ptr(), Owner(kind, self.namer.owner_name(name, part), layout)


def quantisation_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of bitsandbytes' `QuantState`, and of the nested one of double quantisation."""
    for part in ("absmax", "code", "offset"):
        tensor = getattr(state, part)
        if isinstance(tensor, Tensor):
            yield prefix + part, tensor
    if state.state2 is not None:
        yield from quantisation_tensors(state.state2, f"{prefix}state2.")


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
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base: list[Tensor] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    # Of bitsandbytes, Linear4bit has a state and Params4bit the same; FSDP2's shards of the latter have lost it.
    for state in (getattr(each, "quant_state", None) for each in (*model.modules(), *base)):
        base += [tensor for _, tensor in quantisation_tensors(state)] if state is not None else []
    base += model.buffers()
    for values in optimizer.state.values() if optimizer is not None else ():
        trained += [value for value in values.values() if isinstance(value, Tensor)]
    weights, adapters = (sum(_bytes(tensor, seen) for tensor in tensors) for tensors in (base, trained))
    return Floor(weights, adapters, 2 * residual_elements * _embedding_bytes(model))


def _bytes(tensor: Tensor, seen: set[int]) -> int:
    if hasattr(tensor, "to_local"):  # a DTensor: FSDP2 shards it over cards, and this one's part counts
        tensor = tensor.to_local()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return tensor.numel() * tensor.element_size()


def _embedding_bytes(model: nn.Module) -> int:
    """Bytes of an element of the residual stream: that of the norms, which are never quantised."""
    dtypes = [p.dtype for name, p in model.named_parameters() if "norm" in name and p.dtype.is_floating_point]
    return dtypes[0].itemsize if dtypes else 2
