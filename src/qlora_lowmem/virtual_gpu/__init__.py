"""A virtual GPU: PyTorch's real CUDA build on a machine without one, with a named card's memory and no computation.

What runs is real: dispatcher, operators, caching allocator, `torch.cuda.max_memory_allocated()`, snapshots,
`torch.cuda.OutOfMemoryError`. Only the libraries below PyTorch are replaced: they count memory and compute nothing, so
a program's peak is executed, not estimated, and its values are zeros (`values.toml` lists what follows).

What a replaced library would take from the driver for itself, beside PyTorch's allocator, is not known: NCCL's buffers
above all. A run that uses such a library is told, and `Report.notices` keeps it.

    report = run([sys.executable, "train.py"], get_card("rtx-4050-laptop-6gb"))
    report.peak_device_bytes
"""

from .account import DevicePeaks, Report, read_report
from .cards import (
    Card,
    UnknownCardError,
    VirtualGPUError,
    VirtualGPUUnavailable,
    all_cards,
    current_card,
    get_card,
)
from .launch import environment, run
from .launches import Launches
from .server import JobFailedError, JobResult, Server

__all__ = [
    "Card",
    "DevicePeaks",
    "JobFailedError",
    "JobResult",
    "Launches",
    "Report",
    "Server",
    "UnknownCardError",
    "VirtualGPUError",
    "VirtualGPUUnavailable",
    "all_cards",
    "current_card",
    "environment",
    "get_card",
    "read_report",
    "run",
]
