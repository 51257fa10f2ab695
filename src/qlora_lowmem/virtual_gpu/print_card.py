"""The row of `cards.toml` for the GPU of this machine, measured on it."""

import ctypes
import datetime
import importlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import VirtualGPUUnavailable

_TABLE = Path(__file__).with_name("cards.toml")

# CUdevice_attribute, of cuda.h.
_ATTRIBUTES = {
    "sm_count": 16,
    "l2_bytes": 38,
    "bus_width_bits": 37,
    "clock_khz": 13,
    "memory_clock_khz": 36,
}
_ARCHITECTURE_ATTRIBUTES = {
    "threads_per_sm": 39,
    "blocks_per_sm": 106,
    "shared_per_sm": 81,
    "shared_per_block_optin": 97,
}
_CAPABILITY = (75, 76)

# What cards are sold as; each shows a little less.
_NOMINAL_GB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 141, 180, 192)


@dataclass(frozen=True)
class _Measured:
    title: str
    total_bytes: int
    idle_bytes: int
    context_bytes: int
    capability: tuple[int, int]
    figures: Mapping[str, int]
    architecture: Mapping[str, int]
    driver: str


def card_row(device: int = 0) -> str:
    """TOML of a card like GPU number `device` of this machine; makes a CUDA context on it to see what one takes.

    Raises:
        VirtualGPUUnavailable: there is no such GPU, or it does not let itself be read.
    """
    return _render(_measure(device), datetime.datetime.now(tz=datetime.UTC).date())


def _measure(device: int) -> _Measured:
    try:
        nvml: Any = importlib.import_module("pynvml")
        torch: Any = importlib.import_module("torch")
        torch_version = torch.__version__
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(device)
        idle = nvml.nvmlDeviceGetMemoryInfo(handle).used
        # One kernel, so that PyTorch's own code is on the card as in every job.
        kept = torch.zeros(1, device=f"cuda:{device}")
        torch.cuda.synchronize(device)
        used = nvml.nvmlDeviceGetMemoryInfo(handle).used
        driver = ctypes.CDLL("libcuda.so.1")
        measured = _Measured(
            title=str(torch.cuda.get_device_name(device)),
            total_bytes=torch.cuda.mem_get_info(device)[1],
            idle_bytes=idle,
            context_bytes=used - idle - torch.cuda.memory_reserved(device),
            capability=(_attribute(driver, _CAPABILITY[0], device), _attribute(driver, _CAPABILITY[1], device)),
            figures={name: _attribute(driver, number, device) for name, number in _ATTRIBUTES.items()},
            architecture={name: _attribute(driver, n, device) for name, n in _ARCHITECTURE_ATTRIBUTES.items()},
            driver=f"driver {nvml.nvmlSystemGetDriverVersion()}, CUDA {torch.version.cuda}, PyTorch {torch_version}",
        )
        del kept
    except Exception as error:  # NVML, CUDA and PyTorch each have their own
        raise VirtualGPUUnavailable(
            f"no GPU number {device} that can be read here: {error}. --print-card measures a card on a machine that "
            "has it; --list-cards shows those that are in the table."
        ) from error
    return measured


def _attribute(driver: ctypes.CDLL, number: int, device: int) -> int:
    value = ctypes.c_int()
    status = driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    if status != 0:
        raise RuntimeError(f"cuDeviceGetAttribute({number}) returned {status}")
    return value.value


def _name(title: str, total_bytes: int) -> str:
    """`rtx-4050-laptop-6gb` for an "NVIDIA GeForce RTX 4050 Laptop GPU"."""
    plain = re.sub(
        r"\b(nvidia|geforce|tesla|gpu|sxm\d?|pcie|hbm\d\w?|\d+\s?gb)\b", " ", title.lower().replace("-", " ")
    )
    nominal = next((size for size in _NOMINAL_GB if size * 2**30 >= total_bytes), -(-total_bytes // 2**30))
    return "-".join([*plain.split(), f"{nominal}gb"])


def _render(card: _Measured, date: datetime.date) -> str:
    known = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["architecture"]
    wanted = dict(card.architecture) | {"compute_capability": list(card.capability)}
    architecture = next((name for name, row in known.items() if row == wanted), None)
    lines = []
    if architecture is None:
        architecture = f"sm-{card.capability[0]}{card.capability[1]}"
        lines += [f"[architecture.{architecture}]", *(f"{key} = {value}" for key, value in wanted.items()), ""]
    name = _name(card.title, card.total_bytes)
    lines += [f"[card.{name}]", f"title = {json.dumps(card.title)}", f'architecture = "{architecture}"']
    lines += [f"{key} = {value}" for key, value in card.figures.items()]
    lines.append(f"total_bytes = {card.total_bytes}")
    lines.append(f"usable_bytes = {card.total_bytes - card.idle_bytes}")
    lines.append(f"context_bytes = {card.context_bytes}")
    here = f"measured by --print-card ({date}; {card.driver})"
    sources = {
        "total_bytes": f"cudaMemGetInfo, {here}",
        "usable_bytes": f"the total less the {card.idle_bytes} bytes that NVML showed in use before, {here}",
        "context_bytes": f"NVML after PyTorch's first kernel, less before, less what its allocator held, {here}",
        "sm_count": f"cuDeviceGetAttribute, {here}",
    }
    lines += [f"[card.{name}.sources]", *(f"{key} = {json.dumps(text)}" for key, text in sources.items())]
    return "\n".join(lines)
