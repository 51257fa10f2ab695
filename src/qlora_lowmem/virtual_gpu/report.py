"""What a run on a virtual GPU used."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import account
from .cards import Card

ACCOUNT_FILE = "account.bin"
_PEAK_FILES = "torch-*.json"


@dataclass(frozen=True)
class DevicePeaks:
    """One card of the machine, in bytes. Allocated and reserved are the highest of any process on it."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int


@dataclass(frozen=True)
class Report:
    """Peaks of a run, in bytes, and how it ended.

    Attributes:
        exit_code: of the program; 128 plus the number of the signal that ended it.
        peak_allocated_bytes: `torch.cuda.max_memory_allocated()` over the whole run, of the process and card with most.
        peak_reserved_bytes: `torch.cuda.max_memory_reserved()`, likewise.
        peak_device_bytes: what the fullest card held at once: allocations of all processes and their contexts.
        context_bytes: how much of that a process' CUDA context takes.
        peak_pinned_host_bytes: pinned host memory, which a real machine cannot swap.
        peak_managed_bytes: managed memory (paged optimizers), which the allocator does not see.
        missing_functions: CUDA functions that the program called and that are not implemented.
        device: the card's name.
        provenance: always `virtual`.
        versions: of torch and CUDA, where the program used them.
        values_read: the program copied data from the card; it was zeros.
        notices: what the run's stderr said of these figures: memory that is not known here and not in them
            (`nccl_buffers`, `dnn_workspaces`, `solver_workspaces`, `sparse_workspaces`, `fft_workspaces`), and parts of
            the program that were not seen (`no_hooks`, `static_runtime`).
        complete: every process that used torch's allocator ended in a way that let it report. Where False (a process
            was killed), allocated and reserved are what was last known; the device's peak is exact all the same.
    """

    exit_code: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    context_bytes: int
    peak_pinned_host_bytes: int
    peak_managed_bytes: int
    missing_functions: tuple[str, ...]
    device: str
    versions: Mapping[str, str]
    values_read: bool
    complete: bool
    devices: tuple[DevicePeaks, ...]
    provenance: str = "virtual"
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data; sizes are integers in bytes."""
        return asdict(self)


def _is_complete(reading: account.AccountReading, processes: list[dict[str, Any]]) -> bool:
    used = any(device.peak_bytes for device in reading.devices)
    seen = bool(processes) or not used
    return seen and "no_hooks" not in reading.notices and all(process["ended"] for process in processes)


def read_report(folder: Path, card: Card, exit_code: int) -> Report:
    """Reads what the processes of a run left in its report folder.

    Raises:
        OSError: the folder has no account.
        ValueError: its account is damaged.
    """
    reading = account.read(folder / ACCOUNT_FILE)
    processes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(_PEAK_FILES))]
    allocated = [0] * len(reading.devices)
    reserved = [0] * len(reading.devices)
    versions: dict[str, str] = {}
    for process in processes:
        versions |= process["versions"]
        for device, (process_allocated, process_reserved) in enumerate(process["peaks"]):
            allocated[device] = max(allocated[device], process_allocated)
            reserved[device] = max(reserved[device], process_reserved)
    devices = tuple(
        DevicePeaks(allocated[index], reserved[index], device.peak_bytes)
        for index, device in enumerate(reading.devices)
    )
    return Report(
        exit_code=exit_code,
        peak_allocated_bytes=max(allocated),
        peak_reserved_bytes=max(reserved),
        peak_device_bytes=max(device.peak_bytes for device in reading.devices),
        context_bytes=card.context_bytes,
        peak_pinned_host_bytes=reading.pinned_peak_bytes,
        peak_managed_bytes=reading.managed_peak_bytes,
        missing_functions=reading.missing_functions,
        device=card.name,
        versions=versions,
        values_read=reading.values_read,
        complete=_is_complete(reading, processes),
        notices=reading.notices,
        devices=devices,
    )
