"""What all processes of a run use of a card together, at once, asked by one of them.

PyTorch's counters are those of one process. On a virtual machine the account knows all: what `torch.cuda` would count
in each process, summed at every allocation, whoever makes it and however the processes were started or ended.
"""

import ctypes
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Together:
    """Peaks of all processes on one card since `begin`, in bytes, each at its own moment.

    Attributes:
        allocated: what their tensors took; of a process without PyTorch, all that it took.
        reserved: the segments of their caching allocators.
        device: what the card held, the contexts of all included.
        allocated_here: what the process that began had of `allocated` at that moment.
        others: how many other processes used the card since, or had it in use.
    """

    allocated: int
    reserved: int
    device: int
    allocated_here: int
    others: int


def begin() -> bool:
    """Start the peaks afresh, from what is held now. False: this process is not on a virtual machine."""
    return _call("vgpu_begin_together")


def read(device: int = 0) -> Together | None:
    """The peaks since; None where this process is not on a virtual machine. `device` is CUDA's number here."""
    numbers = (ctypes.c_uint64 * 5)()
    return Together(*numbers) if _call("vgpu_read_together", device, numbers) else None


def _call(name: str, *arguments: Any) -> bool:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
    return function is not None
