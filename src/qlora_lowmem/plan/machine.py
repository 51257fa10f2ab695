"""The GPU of this machine as a virtual card, with what other programs leave of it.

    python -m qlora_lowmem.plan.machine

prints what torch says of its device 0 as JSON. It is a process of its own because asking makes a CUDA context, which
would be counted with what other programs hold.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from types import MappingProxyType

import pynvml

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.gate.measured_card import DeviceProperties, read_properties, virtual_twin

_COMMAND = (sys.executable, "-m", "qlora_lowmem.plan.machine")


@dataclass(frozen=True)
class Device:
    """torch's device 0.

    Attributes:
        uuid: without NVML's prefix. Numbers are no identity: `CUDA_VISIBLE_DEVICES` and `CUDA_DEVICE_ORDER` change
            torch's, and not NVML's.
    """

    properties: DeviceProperties
    uuid: str


def card_of_this_machine() -> virtual_gpu.Card:
    """A virtual card like the GPU of this machine that torch takes first.

    What torch says of the GPU replaces the figures of the nearest card of the table, which keeps its name. Usable is
    what NVML shows as not in use now; the CUDA context's size is the table's.

    Raises:
        UsageError: there is no GPU that torch can use, or NVML does not know it.
    """
    device = _device()
    properties = device.properties
    nearest = virtual_gpu.get_card(virtual_twin(properties, 0).name)
    twin = virtual_twin(properties, nearest.context_bytes)
    used = _used_by_others(device.uuid)
    sources = dict(twin.sources) | {
        "usable_bytes": f"the total less the {used} bytes that NVML showed in use",
        "context_bytes": f"as of {nearest.name} in the table: {nearest.sources['context_bytes']}",
    }
    usable = max(twin.total_bytes - used, twin.context_bytes)
    return replace(twin, usable_bytes=usable, sources=MappingProxyType(sources))


def _device() -> Device:
    done = subprocess.run(_COMMAND, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"--gpu needs a GPU that torch can use, and it says: {last}")
    content = json.loads(done.stdout)
    return Device(DeviceProperties(**content["properties"]), content["uuid"])


def _read_device() -> Device:
    """In the process of its own."""
    import torch

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return Device(read_properties(0), uuid.removeprefix("GPU-").removeprefix("MIG-"))


def _used_by_others(uuid: str) -> int:
    """Bytes in use on the GPU, or on the part of one (MIG), that has this UUID.

    Raises:
        UsageError: NVML knows none.
    """
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
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_read_device())))
