"""Finds extensions that bring a CUDA runtime of their own, whose calls the virtual GPU does not see."""

import ctypes
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO

_STATIC_RUNTIME = 64  # Notice in account.h
_REGISTER = b"__cudaRegisterFatBinary"
# NVIDIA's libraries have a runtime of their own by design, and nothing calls the real ones here.
_OURS = ("/nvidia/", "libvgpu.so", "-virtual.so")


def tell_of_static_runtimes() -> None:
    """Says once a run which loaded extensions hold device code and a runtime linked into them."""
    found = sorted({path for path in _loaded_libraries() if has_static_runtime(path)})
    if found and ctypes.CDLL(None).vgpu_first_notice(_STATIC_RUNTIME) & 1:
        print(
            f"virtual GPU: {', '.join(found)} has the CUDA runtime linked into it (libcudart_static): its allocations "
            "and launches do not reach the virtual card. Build it with the shared runtime (nvcc -cudart shared).",
            file=sys.stderr,
        )


def _loaded_libraries() -> Iterator[str]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:  # noqa: PTH123
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if ".so" in line}
    return (path for path in paths if path.startswith("/") and not any(part in path for part in _OURS))


def has_static_runtime(path: str) -> bool:
    """Whether an ELF file holds device code (.nv_fatbin), but does not get the function that registers it from outside.

    With the shared runtime its name is among the file's dynamic symbols; with the static one it is a local function.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            header = file.read(64)
            if header[:5] != b"\x7fELF\x02":
                return False
            (offset,) = struct.unpack_from("<Q", header, 40)
            size, count, names_index = struct.unpack_from("<3H", header, 58)
            file.seek(offset)
            table = file.read(size * count)
            rows = [struct.unpack_from("<IIQQQQ", table, size * index) for index in range(count)]
            names = _content(file, rows[names_index])
            sections = {names[row[0] : names.index(b"\0", row[0])]: row for row in rows}
            if b".nv_fatbin" not in sections or b".dynstr" not in sections:
                return False
            return _REGISTER not in _content(file, sections[b".dynstr"])
    except (OSError, struct.error, ValueError, IndexError):
        return False  # gone, or no file that a loader would take


def _content(file: BinaryIO, row: tuple[int, ...]) -> bytes:
    file.seek(row[4])
    return file.read(row[5])
