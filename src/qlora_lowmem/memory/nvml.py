"""Which of NVML's cards is which of CUDA's: NVML counts every card of the machine, CUDA those that are visible."""

import os
from typing import Any

import pynvml


def device_handle(index: int = 0) -> Any:
    """NVML's handle of CUDA device `index` of this process, without making a CUDA context, which would be counted.

    `CUDA_VISIBLE_DEVICES` is followed, by numbers or by UUIDs, whole or their beginnings. Numbers are in the order of
    the bus, NVML's own; CUDA counts so with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and by default where all cards are of one
    kind.

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
