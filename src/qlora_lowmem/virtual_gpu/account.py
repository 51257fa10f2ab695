"""What a run on a virtual GPU used: the account, a file that every process on the machine maps, and the run's report.

The parent creates the account (`csrc/account.h` is the same layout in C++), so the device's peak is there to read
whatever happened to the processes. What PyTorch's allocator counted lies beside it, in a file of each process.
"""

import json
import struct
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cards import Card
from .launches import KINDS, Launches

ACCOUNT_FILE = "account.bin"
PEAK_FILES = "torch-*.json"

_MAGIC = b"VGPUACC\0"
_LAYOUT_VERSION = 4
MAX_DEVICES = 16
_MAX_PROCESSES = 256
_MAX_MISSING = 256
_NAME_BYTES = 96

# Names of the bits of Notice in account.h.
_NOTICES = (
    "nccl_buffers", "dnn_workspaces", "solver_workspaces", "sparse_workspaces", "fft_workspaces", "no_hooks",
    "static_runtime", "values_read", "reached", "in_force",
)  # fmt: skip
# magic; layout version, devices, missing functions, notices; pinned now and peak, managed now and peak; launches of
# processes that have ended. What is left out, here and of a device, only the processes read (together.py).
_HEADER = struct.Struct(f"<8s4I4Q16x{KINDS}Q32x")
# name, uuid; total, context, used, peak; capability, SMs, limits, clocks
_DEVICE = struct.Struct(f"<{_NAME_BYTES}s16s4Q13I60x")
_PROCESS_BYTES = 448
_LAUNCHES = struct.Struct(f"<{KINDS}Q")  # the last of a process
_PROCESSES_AT = _HEADER.size + MAX_DEVICES * _DEVICE.size
_MISSING_AT = _PROCESSES_AT + _MAX_PROCESSES * _PROCESS_BYTES
FILE_BYTES = _MISSING_AT + _MAX_MISSING * _NAME_BYTES


@dataclass(frozen=True)
class AccountReading:
    """What the account says; `device_peak_bytes` of each device, the contexts of all processes included."""

    device_peak_bytes: tuple[int, ...]
    pinned_peak_bytes: int
    managed_peak_bytes: int
    missing_functions: tuple[str, ...]
    notices: tuple[str, ...]
    launches: Launches


def create(path: Path, card: Card, count: int) -> None:
    """Writes the account of a machine with `count` such cards, nothing in use.

    Raises:
        ValueError: `count` is not between 1 and 16.
    """
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"count is {count}; a virtual machine has 1 to {MAX_DEVICES} cards")
    content = bytearray(FILE_BYTES)
    _HEADER.pack_into(content, 0, _MAGIC, _LAYOUT_VERSION, count, *[0] * (6 + KINDS))
    for device in range(count):
        _DEVICE.pack_into(content, _HEADER.size + device * _DEVICE.size, *_device_row(card, device))
    path.write_bytes(content)


def _device_row(card: Card, device: int) -> tuple[bytes | int, ...]:
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, f"{card.name}.{device}.virtual-gpu")
    return (
        card.title.encode()[: _NAME_BYTES - 1], identity.bytes,
        card.total_bytes, card.context_bytes, 0, 0,  # nothing is in use
        *card.compute_capability, card.sm_count, card.threads_per_sm, card.blocks_per_sm,
        49152,  # shared memory a block has without asking: 48 KiB on every card
        card.shared_per_block_optin, card.shared_per_sm,
        65536,  # registers an SM: the same on every card
        card.l2_bytes, card.bus_width_bits, card.clock_khz, card.memory_clock_khz,
    )  # fmt: skip


def read(path: Path) -> AccountReading:
    """Reads an account, also while processes use it.

    Raises:
        OSError: the file is not there.
        ValueError: it is not an account.
    """
    content = path.read_bytes()
    if len(content) != FILE_BYTES or not content.startswith(_MAGIC):
        raise ValueError(f"{path} is not the account of a virtual machine")
    _, _, count, missing, notices, _, pinned_peak, _, managed_peak, *launches = _HEADER.unpack_from(content)
    rows = (_DEVICE.unpack_from(content, _HEADER.size + device * _DEVICE.size) for device in range(count))
    names = (
        content[start : start + _NAME_BYTES].split(b"\0", 1)[0].decode(errors="replace")
        for start in range(_MISSING_AT, _MISSING_AT + missing * _NAME_BYTES, _NAME_BYTES)
    )
    told = tuple(name for bit, name in enumerate(_NOTICES) if notices >> bit & 1)
    device_peaks = tuple(row[5] for row in rows)
    ends = range(_PROCESSES_AT + _PROCESS_BYTES, _MISSING_AT + 1, _PROCESS_BYTES)
    living = (Launches(*_LAUNCHES.unpack_from(content, end - _LAUNCHES.size)) for end in ends)
    launched = sum(living, Launches(*launches))
    return AccountReading(device_peaks, pinned_peak, managed_peak, tuple(names), told, launched)


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
        reached: a process asked for a card, were it only how many there are. Where False, nothing was run on it.
        in_force: a process of the program had the machine's libraries loaded.
        launches: kernels, copies and memsets that all processes submitted, from first to last.
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
    reached: bool = True
    in_force: bool = True
    launches: Launches = field(default_factory=Launches)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data; sizes are integers in bytes."""
        return asdict(self)


def read_report(folder: Path, card: Card, exit_code: int) -> Report:
    """Reads what the processes of a run left in its report folder.

    Raises:
        OSError: the folder has no account.
        ValueError: its account is no longer one.
    """
    reading = read(folder / ACCOUNT_FILE)
    processes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(PEAK_FILES))]
    versions = {name: version for process in processes for name, version in process["versions"].items()}
    devices = []
    for index, device_peak in enumerate(reading.device_peak_bytes):
        peaks = [process["peaks"][index] for process in processes if index < len(process["peaks"])]
        allocated, reserved = (max(figures) for figures in zip((0, 0), *peaks, strict=True))
        devices.append(DevicePeaks(allocated, reserved, device_peak))
    peak_device_bytes = max(reading.device_peak_bytes)
    reached = "reached" in reading.notices
    seen = reached and bool(processes or not peak_device_bytes) and "no_hooks" not in reading.notices
    return Report(
        exit_code=exit_code,
        peak_allocated_bytes=max(device.peak_allocated_bytes for device in devices),
        peak_reserved_bytes=max(device.peak_reserved_bytes for device in devices),
        peak_device_bytes=peak_device_bytes,
        context_bytes=card.context_bytes,
        peak_pinned_host_bytes=reading.pinned_peak_bytes,
        peak_managed_bytes=reading.managed_peak_bytes,
        missing_functions=reading.missing_functions,
        device=card.name,
        versions=versions,
        values_read="values_read" in reading.notices,
        complete=seen and all(process["ended"] for process in processes),
        notices=tuple(name for name in reading.notices if name not in ("values_read", "reached", "in_force")),
        reached=reached,
        in_force="in_force" in reading.notices,
        launches=reading.launches,
        devices=tuple(devices),
    )
