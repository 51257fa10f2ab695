"""What programs submit to a virtual card: kernels, copies, memsets, each counted as it is submitted.

Exact as the bytes are: the same calls reach a card's driver. What a library's call launches beyond its one kernel (a
product split over several, a transposition first) is chosen on the card and is not in the figures.
"""

import ctypes
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

KINDS = 3  # as the account has them (csrc/account.h): kernels, copies, memsets


@dataclass(frozen=True)
class Launches:
    """How often a program sent work to its cards, whatever its size.

    Attributes:
        kernels: kernels of PyTorch, of extensions and Triton; a call of cuBLAS, cuDNN or another library that computes
            is one, and so is a collective of NCCL.
        copies: between host and device, either way, and within the device where no kernel does it.
        memsets: fills by the driver.
    """

    kernels: int = 0
    copies: int = 0
    memsets: int = 0

    @property
    def total(self) -> int:
        """All of them: what the host waits for, one by one."""
        return self.kernels + self.copies + self.memsets

    @staticmethod
    def most(each: "Iterable[Launches]") -> "Launches":
        """Those that are most in all; none of nothing."""
        return max(each, key=lambda launches: launches.total, default=Launches())

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(self.kernels + other.kernels, self.copies + other.copies, self.memsets + other.memsets)

    def __sub__(self, other: "Launches") -> "Launches":
        return self + other * -1

    def __mul__(self, times: int) -> "Launches":
        return Launches(self.kernels * times, self.copies * times, self.memsets * times)


def of_this_process() -> Launches | None:
    """What this process has submitted until now; None where it is not on a virtual machine: nobody counts there."""
    return _read(0)


def of_all_processes() -> Launches | None:
    """The same of every process that is or was on the machine."""
    return _read(1)


def _read(of_all: int) -> Launches | None:
    read = _function()
    if read is None:
        return None
    counts = (ctypes.c_uint64 * KINDS)()
    read(of_all, counts)
    return Launches(*counts)


@functools.cache
def _function() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "vgpu_read_launches", None)
