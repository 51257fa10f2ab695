"""The account: the file that every process on a virtual machine maps (`csrc/account.h` is the same layout in C++).

The parent creates it, so the peak is there to read whatever happened to the process.
"""

import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

from .cards import Card

_MAGIC = b"VGPUACC\0"
_LAYOUT_VERSION = 1
MAX_DEVICES = 16
_MAX_PROCESSES = 256
_MAX_MISSING = 256
_NAME_BYTES = 96

# Names of the bits of Notice in account.h.
_NOTICES = (
    "nccl_buffers", "dnn_workspaces", "solver_workspaces", "sparse_workspaces", "fft_workspaces", "no_hooks",
    "static_runtime",
)  # fmt: skip
# magic; layout version, devices, missing functions, values read, spare, notices; pinned now and peak, managed
# now and peak
_HEADER = struct.Struct("<8s6I4Q64x")
# name, uuid; total, context, used, peak; capability, SMs, limits, clocks
_DEVICE = struct.Struct(f"<{_NAME_BYTES}s16s4Q13I60x")
_PROCESS_BYTES = 192
_PROCESSES_AT = _HEADER.size + MAX_DEVICES * _DEVICE.size
_MISSING_AT = _PROCESSES_AT + _MAX_PROCESSES * _PROCESS_BYTES
FILE_BYTES = _MISSING_AT + _MAX_MISSING * _NAME_BYTES


@dataclass(frozen=True)
class DeviceAccount:
    """One device of the machine, in bytes: `used` and `peak` include the contexts of all processes."""

    total_bytes: int
    context_bytes: int
    used_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class AccountReading:
    """What the account says."""

    devices: tuple[DeviceAccount, ...]
    pinned_peak_bytes: int
    managed_peak_bytes: int
    values_read: bool
    missing_functions: tuple[str, ...]
    notices: tuple[str, ...]


def create(path: Path, card: Card, count: int) -> None:
    """Writes the account of a machine with `count` such cards, nothing in use.

    Raises:
        ValueError: `count` is not between 1 and 16.
    """
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"count is {count}; a virtual machine has 1 to {MAX_DEVICES} cards")
    content = bytearray(FILE_BYTES)
    _HEADER.pack_into(content, 0, _MAGIC, _LAYOUT_VERSION, count, 0, 0, 0, 0, 0, 0, 0, 0)
    for device in range(count):
        _DEVICE.pack_into(content, _HEADER.size + device * _DEVICE.size, *_device_row(card, device))
    path.write_bytes(content)


def _device_row(card: Card, device: int) -> tuple[bytes | int, ...]:
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, f"{card.name}.{device}.virtual-gpu")
    return (
        card.title.encode()[: _NAME_BYTES - 1],
        identity.bytes,
        card.total_bytes,
        card.context_bytes,
        0,  # used
        0,  # peak
        *card.compute_capability,
        card.sm_count,
        card.threads_per_sm,
        card.blocks_per_sm,
        49152,  # shared memory a block has without asking: 48 KiB on every card
        card.shared_per_block_optin,
        card.shared_per_sm,
        65536,  # registers an SM: the same on every card
        card.l2_bytes,
        card.bus_width_bits,
        card.clock_khz,
        card.memory_clock_khz,
    )


def read(path: Path) -> AccountReading:
    """Reads an account, also while processes use it.

    Raises:
        OSError: the file is not there.
        ValueError: it is not an account.
    """
    content = path.read_bytes()
    if len(content) != FILE_BYTES or not content.startswith(_MAGIC):
        raise ValueError(f"{path} is not the account of a virtual machine")
    _, _, count, missing, values_read, _, notices, _, pinned_peak, _, managed_peak = _HEADER.unpack_from(content)
    devices = []
    for device in range(count):
        row = _DEVICE.unpack_from(content, _HEADER.size + device * _DEVICE.size)
        devices.append(DeviceAccount(*row[2:6]))
    names = (
        content[start : start + _NAME_BYTES].split(b"\0", 1)[0].decode(errors="replace")
        for start in range(_MISSING_AT, _MISSING_AT + missing * _NAME_BYTES, _NAME_BYTES)
    )
    told = tuple(name for bit, name in enumerate(_NOTICES) if notices >> bit & 1)
    return AccountReading(tuple(devices), pinned_peak, managed_peak, bool(values_read), tuple(names), told)
