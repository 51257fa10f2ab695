"""The GPU of this machine: which one it is, what it is called, and itself as a virtual card.

    python -m qlora_lowmem.memory.device

prints what torch says of its device 0 as JSON. It is a process of its own because asking makes a CUDA context, which
would be counted with what is measured here, or with what other programs hold.
"""

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
import pynvml

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.virtual_gpu import Card


def device_handle(index: int = 0) -> Any:
    """NVML's handle of CUDA device `index` of this process, without making a CUDA context, which would be counted.

    NVML counts every card of the machine, CUDA those that are visible. `CUDA_VISIBLE_DEVICES` is followed, by numbers
    or by UUIDs, whole or their beginnings. Numbers are in the order of the bus, NVML's own; CUDA counts so with
    `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and by default where all cards are of one kind.

    Raises:
        pynvml.NVMLError: there is no driver or no such device.
    """
    pynvml.nvmlInit()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    if index >= len(visible):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    name = visible[index]
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    for number in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        if str(pynvml.nvmlDeviceGetUUID(handle)).startswith(name):
            return handle
    return pynvml.nvmlDeviceGetHandleByUUID(name)  # a part of a card (MIG), which has a UUID of its own


def device_name(index: int = 0) -> str:
    """The card's name: of the table for a virtual GPU, else NVIDIA's own in lower case with dashes.

    Raises:
        pynvml.NVMLError: there is no driver or no such device.
    """
    card = virtual_gpu.current_card()
    if card is not None:
        return card.name
    return str(pynvml.nvmlDeviceGetName(device_handle(index))).lower().replace(" ", "-")


def card_like(device: str, total_bytes: int) -> Card | None:
    """The card of the table that is `device`: by its name, or by the name that CUDA gives it and about its memory."""

    def alike(card: Card) -> bool:
        same_name = device in (card.name, card.title.lower().replace(" ", "-"))
        return same_name and abs(card.total_bytes - total_bytes) < card.total_bytes // 10

    return next(filter(alike, virtual_gpu.all_cards()), None)


def driver_version() -> str | None:
    """NVIDIA's driver, `580.95.05`; None on a virtual GPU, which has none.

    Raises:
        pynvml.NVMLError: there is no driver.
    """
    if virtual_gpu.current_card() is not None:
        return None
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` says of a GPU, as far as memory can depend on it: fields of a `Card`.

    The UUID is without NVML's prefix. Numbers are no identity: `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` change
    torch's, and not NVML's.
    """

    title: str
    total_bytes: int
    compute_capability: tuple[int, int]
    sm_count: int
    l2_bytes: int
    threads_per_sm: int
    shared_per_sm: int
    shared_per_block_optin: int
    uuid: str = field(default="", compare=False)


def properties_of_this_machine() -> DeviceProperties:
    """What torch says of its device 0, asked in a process of its own.

    Raises:
        UsageError: there is no GPU that torch can use.
    """
    command = [sys.executable, "-m", "qlora_lowmem.memory.device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"--gpu needs a GPU that torch can use, and it says: {last}")
    return msgspec.json.decode(done.stdout, type=DeviceProperties)


def _read_properties() -> DeviceProperties:
    import torch

    found: Any = torch.cuda.get_device_properties(0)
    return DeviceProperties(
        title=found.name,
        total_bytes=found.total_memory,
        compute_capability=(found.major, found.minor),
        sm_count=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
        threads_per_sm=found.max_threads_per_multi_processor,
        shared_per_sm=found.shared_memory_per_multiprocessor,
        shared_per_block_optin=found.shared_memory_per_block_optin,
        uuid=str(found.uuid).removeprefix("GPU-").removeprefix("MIG-"),
    )


def virtual_twin(properties: DeviceProperties, context_bytes: int) -> Card:
    """The nearest card of the table, made equal to a measured GPU.

    Everything that torch tells of the GPU replaces the table's figure; clocks and bus width, which memory does not
    depend on, stay the table's, and so does the card's name: it is what a virtual process looks its card up by.

    Args:
        properties: of the measured GPU.
        context_bytes: what its processes held outside the caching allocator, measured.
    """
    nearest = _nearest(properties)
    measured: dict[str, Any] = vars(properties) | {"usable_bytes": properties.total_bytes}
    del measured["uuid"]
    source = f"torch.cuda.get_device_properties of the measured {properties.title}"
    sources = dict(nearest.sources) | dict.fromkeys(measured, source)
    sources["context_bytes"] = f"held outside the allocator in the measured runs on {properties.title}"
    return dataclasses.replace(nearest, **measured, context_bytes=context_bytes, sources=MappingProxyType(sources))


def _nearest(properties: DeviceProperties) -> Card:
    """By compute capability, then by memory."""
    major, minor = properties.compute_capability

    def distance(card: Card) -> tuple[int, int]:
        generations = abs((card.compute_capability[0] - major) * 10 + card.compute_capability[1] - minor)
        return (generations, abs(card.total_bytes - properties.total_bytes))

    return min(virtual_gpu.all_cards(), key=distance)


def card_of_this_machine() -> Card:
    """A virtual card like the GPU of this machine that torch takes first.

    What torch says of the GPU replaces the figures of the nearest card of the table, which keeps its name. Usable is
    what NVML shows as not in use now; the CUDA context's size is the table's.

    Raises:
        UsageError: there is no GPU that torch can use, or NVML does not know it.
    """
    properties = properties_of_this_machine()
    nearest = _nearest(properties)
    twin = virtual_twin(properties, nearest.context_bytes)
    used = _used_by_others(properties.uuid)
    sources = dict(twin.sources) | {
        "usable_bytes": f"the total less the {used} bytes that NVML showed in use",
        "context_bytes": f"as of {nearest.name} in the table: {nearest.sources['context_bytes']}",
    }
    usable = max(twin.total_bytes - used, twin.context_bytes)
    return dataclasses.replace(twin, usable_bytes=usable, sources=MappingProxyType(sources))


def _used_by_others(uuid: str) -> int:
    """Bytes in use on the GPU, or on the part of one (MIG), that has this UUID."""
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError as error:
        raise UsageError(
            f"--gpu: what is free on the GPU {uuid} that torch uses cannot be asked of NVML ({error}); name a card of "
            "the table with --card"
        ) from None


if __name__ == "__main__":
    print(msgspec.json.encode(_read_properties()).decode())
