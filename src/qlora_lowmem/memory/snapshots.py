"""Snapshots of the caching allocator, taken and kept without disturbing what they show."""

import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.cuda import memory as cuda_memory


@contextmanager
def no_collection() -> Iterator[None]:
    """Many small objects are made here; a collection in their midst would free the job's garbage at another time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def take_snapshot() -> dict[str, Any]:
    """The allocator's segments, blocks and recorded history, as `torch.cuda.memory._snapshot` gives them."""
    with no_collection():
        snapshot: dict[str, Any] = cuda_memory._snapshot()
        return snapshot


def write_snapshot(snapshot: dict[str, Any], path: Path) -> None:
    """Write a snapshot for https://pytorch.org/memory_viz, which opens it as torch's own `_dump_snapshot`."""
    with path.open("wb") as file:
        pickle.dump(snapshot, file)


def library_workspaces(device: int) -> set[int]:
    """Addresses of cuBLAS' and cuBLASLt's workspaces on a device: what torch lets go when told to clear them.

    torch makes new ones when it needs them.
    """
    held = _active(device)
    torch._C._cuda_clearCublasWorkspaces()
    return held - _active(device)


def _active(device: int) -> set[int]:
    return {
        block["address"]
        for segment in take_snapshot()["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
