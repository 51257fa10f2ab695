"""The table of cards: what each reports about itself, and where every figure comes from (`cards.toml`)."""

import ctypes
import dataclasses
import datetime
import difflib
import functools
import importlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

_TABLE = Path(__file__).with_name("cards.toml")

# Set in every process on a virtual GPU: the card's name, and its memory where that is not the table's.
CARD_VARIABLE = "QLORA_LOWMEM_VIRTUAL_CARD"
MEMORY_VARIABLE = "QLORA_LOWMEM_VIRTUAL_CARD_BYTES"


class VirtualGPUError(Exception):
    """Base of everything that this package raises."""


class VirtualGPUUnavailable(VirtualGPUError):
    """This machine or this Python environment cannot host a virtual GPU. The message says why and what to do."""


class UnknownCardError(VirtualGPUError):
    """A card's name that is not in the table; the message lists close matches and all names."""

    def __init__(self, name: str) -> None:
        known = {_plain(card): card for card in sorted(_table()["card"])}
        close = [known[match] for match in difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.6)]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        listed = ", ".join(known.values())
        super().__init__(
            f"unknown card {name!r}.{hint} Known cards: {listed}; or a size such as 12GB: a generic card of that memory"
        )
        self.name = name


def _plain(name: str) -> str:
    """What people vary least in a card's name: `RTX 4050 6GB` and `rtx-4050-laptop-6gb` are close."""
    return "".join(part for part in name.lower().replace(" ", "-").split("-") if part not in ("laptop", "nvidia"))


@dataclass(frozen=True)
class Card:
    """A kind of GPU. All sizes are bytes, all clocks kHz.

    Attributes:
        name: how people write it, `rtx-4050-laptop-6gb`.
        title: the name that CUDA reports.
        total_bytes: the memory that CUDA reports.
        usable_bytes: what a job, its context included, can count on beside a desktop and the driver's reservation.
        context_bytes: what a process' CUDA context takes of it, before any allocation.
        compute_capability: `(8, 9)` for sm_89.
        sources: where each figure comes from, with its date; says so where one is an assumption.
    """

    name: str
    title: str
    total_bytes: int
    usable_bytes: int
    context_bytes: int
    compute_capability: tuple[int, int]
    sm_count: int
    threads_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int
    shared_per_block_optin: int
    l2_bytes: int
    bus_width_bits: int
    clock_khz: int
    memory_clock_khz: int
    sources: Mapping[str, str] = dataclasses.field(repr=False, compare=False)

    @property
    def supports_bf16(self) -> bool:
        """Whether the card multiplies bfloat16 matrices itself: compute capability 8.0 (Ampere) and later."""
        return self.compute_capability >= (8, 0)

    def with_memory(self, total_bytes: int) -> "Card":
        """The same kind of card with another amount of memory, to ask what a job would need.

        What is set aside for a desktop stays the same.

        Raises:
            ValueError: less than the context takes, or more than a virtual card can address.
        """
        if total_bytes > MOST_BYTES:
            raise ValueError(
                f"{total_bytes} bytes is not a card's memory: a virtual card has {MOST_BYTES} at most (1 TiB)"
            )
        if total_bytes <= self.context_bytes:
            raise ValueError(
                f"{total_bytes} bytes is not a card's memory: the CUDA context alone takes {self.context_bytes}"
            )
        set_aside = self.total_bytes - self.usable_bytes
        usable = max(total_bytes - set_aside, self.context_bytes)
        sources = dict(self.sources) | {"total_bytes": "set by the caller", "usable_bytes": "set by the caller"}
        return dataclasses.replace(
            self, total_bytes=total_bytes, usable_bytes=usable, sources=MappingProxyType(sources)
        )


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def all_cards() -> tuple[Card, ...]:
    """Every card of the table, the smallest first."""
    return tuple(sorted(map(get_card, _table()["card"]), key=lambda card: (card.total_bytes, card.name)))


MOST_BYTES = 2**40  # the addresses that a virtual card has
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`6GB` (10^9 each), `5.5GiB` (2^30) or a number of bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9]{1,40})(?:\.([0-9]{1,40}))?\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(match[3].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write 6GB (10^9 each), 5.5GiB (2^30) or bytes")
    fraction = match[2] or ""
    # Integers all the way: 5.1GiB must not depend on how 5.1 rounds in binary.
    return int(match[1]) * factor + int(fraction or 0) * factor // int(10 ** len(fraction))


@functools.cache
def get_card(name: str) -> Card:
    """The card of that name: of the table; `rtx-3060-12gb@8GiB`, one of the table with another memory; or `12GB`, a
    generic card of that memory.

    Raises:
        UnknownCardError: there is none.
        VirtualGPUError: a size that is no card's.
    """
    if name in _table()["card"]:
        return _card(name, _table()["card"][name])
    like, _, size = name.rpartition("@")
    card = get_card(like) if like else _card("", _table()["generic"])
    if not size[-1:].isalpha():  # a number alone may be meant as a card's name
        raise UnknownCardError(name)
    try:
        total = parse_size(size)
    except ValueError:
        raise UnknownCardError(name) from None
    try:
        return dataclasses.replace(card.with_memory(total), name="".join(name.lower().split()))
    except ValueError as error:
        raise VirtualGPUError(f"card {name!r}: {error}") from None


def _card(name: str, row: Mapping[str, Any]) -> Card:
    row = dict(row)
    fields = _table()["architecture"][row.pop("architecture")] | row
    major, minor = fields.pop("compute_capability")
    sources = MappingProxyType(dict(fields.pop("sources")))
    return Card(name=name, compute_capability=(major, minor), sources=sources, **fields)


def current_card() -> Card | None:
    """The card that this process runs on, or None where it is not on a virtual GPU."""
    name = os.environ.get(CARD_VARIABLE)
    if not name:
        return None
    card = get_card(name)
    memory = os.environ.get(MEMORY_VARIABLE)
    return card.with_memory(int(memory)) if memory else card


# --- A row for the GPU of this machine, measured on it ---------------------------------------------------------------

# CUdevice_attribute, of cuda.h.
_ATTRIBUTES = {"sm_count": 16, "l2_bytes": 38, "bus_width_bits": 37, "clock_khz": 13, "memory_clock_khz": 36}
_ARCHITECTURE_ATTRIBUTES = {
    "threads_per_sm": 39, "blocks_per_sm": 106, "shared_per_sm": 81, "shared_per_block_optin": 97,
}  # fmt: skip

# What cards are sold as; each shows a little less.
_NOMINAL_GB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 141, 180, 192)


def card_row(device: int = 0) -> str:
    """TOML of a card like GPU number `device` of this machine; makes a CUDA context on it to see what one takes.

    Raises:
        VirtualGPUUnavailable: there is no such GPU, or it does not let itself be read.
    """
    try:
        return _measure(device)
    except Exception as error:  # NVML, CUDA and PyTorch each have their own
        raise VirtualGPUUnavailable(
            f"no GPU number {device} that can be read here: {error}. --print-card measures a card on a machine that "
            "has it; --list-cards shows those that are in the table."
        ) from error


def _measure(device: int) -> str:
    nvml: Any = importlib.import_module("pynvml")
    torch: Any = importlib.import_module("torch")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(device)
    idle = nvml.nvmlDeviceGetMemoryInfo(handle).used
    # One kernel, so that PyTorch's own code is on the card as in every job.
    kept = torch.zeros(1, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    context = nvml.nvmlDeviceGetMemoryInfo(handle).used - idle - torch.cuda.memory_reserved(device)
    del kept
    total = torch.cuda.mem_get_info(device)[1]
    title = str(torch.cuda.get_device_name(device))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    versions = f"driver {nvml.nvmlSystemGetDriverVersion()}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"
    here = f"measured by --print-card ({today}; {versions})"
    architecture = _attributes(_ARCHITECTURE_ATTRIBUTES, device)
    architecture["compute_capability"] = list(torch.cuda.get_device_capability(device))
    known = (name for name, row in _table()["architecture"].items() if row == architecture)
    new = "sm-{}{}".format(*architecture["compute_capability"])
    row = {"title": title, "architecture": next(known, new), **_attributes(_ATTRIBUTES, device)}
    row |= {"total_bytes": total, "usable_bytes": total - idle, "context_bytes": context}
    sources = {
        "total_bytes": f"cudaMemGetInfo, {here}",
        "usable_bytes": f"the total less the {idle} bytes that NVML showed in use before, {here}",
        "context_bytes": f"NVML after PyTorch's first kernel, less before, less what its allocator held, {here}",
        "sm_count": f"cuDeviceGetAttribute, {here}",
    }
    name = _name(title, total)
    tables = {f"architecture.{new}": architecture} if row["architecture"] == new else {}
    return _toml(tables | {f"card.{name}": row, f"card.{name}.sources": sources})


def _attributes(numbers: Mapping[str, int], device: int) -> dict[str, Any]:
    driver = ctypes.CDLL("libcuda.so.1")
    values = {}
    for name, number in numbers.items():
        value = ctypes.c_int()
        status = driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        if status != 0:
            raise RuntimeError(f"cuDeviceGetAttribute({number}) returned {status}")
        values[name] = value.value
    return values


def _name(title: str, total_bytes: int) -> str:
    """`rtx-4050-laptop-6gb` for an "NVIDIA GeForce RTX 4050 Laptop GPU"."""
    plain = re.sub(
        r"\b(nvidia|geforce|tesla|gpu|sxm\d?|pcie|hbm\d\w?|\d+\s?gb)\b", " ", title.lower().replace("-", " ")
    )
    nominal = next((size for size in _NOMINAL_GB if size * 2**30 >= total_bytes), -(-total_bytes // 2**30))
    return "-".join([*plain.split(), f"{nominal}gb"])


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of texts, integers and lists of integers, whose JSON is TOML."""
    lines = []
    for name, row in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in row.items())]
    return "\n".join(lines)
