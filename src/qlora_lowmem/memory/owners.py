"""Which tensors are alive and what they are: parameters, quantisation state, gradients, optimizer state.

A tensor is known by the address of its storage, which is the address of the allocator's block. No tensor is held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.memory.scopes import plain_name


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


def weights(model: nn.Module) -> dict[int, Owner]:
    """Address to owner, for every parameter and buffer of `model` and the quantisation state of its 4-bit weights."""
    found: dict[int, Owner] = {}
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        state = getattr(parameter, "quant_state", None)  # only bitsandbytes' Params4bit has one
        if state is not None:
            _add(found, parameter, "weights_4bit", name)
            for part, tensor in quantisation_tensors(state):
                _add(found, tensor, "quantisation", f"{name}.quant_state.{part}")
        else:
            _add(found, parameter, "adapters" if parameter.requires_grad else "weights_other", name)
    for name, buffer in model.named_buffers():
        _add(found, buffer, "weights_other", plain_name(name))
    return found


def gradients(model: nn.Module) -> dict[int, Owner]:
    """Address to owner, for every gradient that parameters hold now."""
    found: dict[int, Owner] = {}
    for name, parameter in model.named_parameters():
        found |= gradient_of(name, parameter)
    return found


def gradient_of(name: str, parameter: nn.Parameter) -> dict[int, Owner]:
    """Address to owner, for the gradient that one parameter holds now, if any."""
    found: dict[int, Owner] = {}
    if parameter.grad is not None:
        _add(found, parameter.grad, "gradients", f"{plain_name(name)}.grad")
    return found


def optimizer_state(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> dict[int, Owner]:
    """Address to owner, for every tensor of the optimizer's state, by parameter."""
    found: dict[int, Owner] = {}
    if optimizer is None:
        return found
    names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor):
                _add(found, value, "optimizer", f"{names.get(parameter, 'parameter')}.{key}")
    return found


def quantisation_tensors(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of bitsandbytes' `QuantState`, and of the nested one of double quantisation."""
    for part in ("absmax", "code", "offset"):
        tensor = getattr(state, part)
        if isinstance(tensor, Tensor):
            yield prefix + part, tensor
    if state.state2 is not None:
        yield from quantisation_tensors(state.state2, f"{prefix}state2.")


def _add(found: dict[int, Owner], tensor: Tensor, kind: str, name: str) -> None:
    if tensor.is_cuda and tensor.untyped_storage().nbytes():
        layout = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        found.setdefault(tensor.untyped_storage().data_ptr(), Owner(kind, name, layout))
