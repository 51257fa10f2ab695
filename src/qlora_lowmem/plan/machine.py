"""The GPU of this machine as a virtual card, with what other programs leave of it."""

from dataclasses import replace
from types import MappingProxyType

import pynvml

from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.measured_card import properties_of_this_machine, virtual_twin


def card_of_this_machine() -> virtual_gpu.Card:
    """A virtual card like GPU 0 of this machine.

    What torch says of the GPU replaces the figures of the nearest card of the table, which keeps its name. Usable is
    what NVML shows as not in use now; the CUDA context's size is the table's.

    Raises:
        UsageError: there is no GPU that torch can use.
    """
    properties = properties_of_this_machine()
    nearest = virtual_gpu.get_card(virtual_twin(properties, 0).name)
    twin = virtual_twin(properties, nearest.context_bytes)
    used = _used_by_others()
    sources = dict(twin.sources) | {
        "usable_bytes": f"the total less the {used} bytes that NVML showed in use",
        "context_bytes": f"as of {nearest.name} in the table: {nearest.sources['context_bytes']}",
    }
    usable = max(twin.total_bytes - used, twin.context_bytes)
    return replace(twin, usable_bytes=usable, sources=MappingProxyType(sources))


def _used_by_others() -> int:
    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()
