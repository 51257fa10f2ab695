"""The GPU of this process, asked of NVML: torch would make a CUDA context, which would be counted."""

import pynvml

from qlora_lowmem import virtual_gpu
from qlora_lowmem.memory.nvml import device_handle


def device_name(index: int = 0) -> str:
    """The card's name: of the table for a virtual GPU, else NVIDIA's own in lower case with dashes.

    Raises:
        pynvml.NVMLError: there is no driver or no such device.
    """
    card = virtual_gpu.current_card()
    if card is not None:
        return card.name
    return str(pynvml.nvmlDeviceGetName(device_handle(index))).lower().replace(" ", "-")


def driver_version() -> str | None:
    """NVIDIA's driver, `580.95.05`; None on a virtual GPU, which has none.

    Raises:
        pynvml.NVMLError: there is no driver.
    """
    if virtual_gpu.current_card() is not None:
        return None
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())
