"""The GPU of this machine as a virtual card, so that a prediction is for the very card that is measured.

    python -m qlora_lowmem.gate.measured_card

prints what torch says of the GPU as JSON. It is a process of its own because asking makes a CUDA context, which would
be counted with the jobs that are measured.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.virtual_gpu import Card


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` says of a GPU, as far as memory can depend on it. Sizes in bytes."""

    name: str
    total_bytes: int
    major: int
    minor: int
    sm_count: int
    l2_bytes: int
    threads_per_sm: int
    shared_per_sm: int
    shared_per_block_optin: int

    @property
    def compute_capability(self) -> tuple[int, int]:
        """`(8, 9)` for sm_89."""
        return (self.major, self.minor)


def read_properties(index: int = 0) -> DeviceProperties:
    """What torch says of a GPU in this process. Makes a CUDA context."""
    import torch

    found = torch.cuda.get_device_properties(index)
    return DeviceProperties(
        name=found.name,
        total_bytes=found.total_memory,
        major=found.major,
        minor=found.minor,
        sm_count=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
        threads_per_sm=found.max_threads_per_multi_processor,
        shared_per_sm=found.shared_memory_per_multiprocessor,
        shared_per_block_optin=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in torch's types
    )


def properties_of_this_machine() -> DeviceProperties:
    """The same, asked in a process of its own.

    Raises:
        UsageError: there is no GPU that torch can use.
    """
    command = [sys.executable, "-m", "qlora_lowmem.gate.measured_card"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"--gpu needs a GPU that torch can use, and it says: {last}")
    return DeviceProperties(**json.loads(done.stdout))


def virtual_twin(properties: DeviceProperties, context_bytes: int, cards: Sequence[Card] | None = None) -> Card:
    """The nearest card of the table, made equal to a measured GPU.

    Nearest is by compute capability, then by memory. Everything that torch tells of the GPU replaces the table's
    figure; clocks and bus width, which memory does not depend on, stay the table's, and so does the card's name: it is
    what a virtual process looks its card up by.

    Args:
        properties: of the measured GPU.
        context_bytes: what its processes held outside the caching allocator, measured.
        cards: to choose from; None for the whole table.
    """
    nearest = min(virtual_gpu.all_cards() if cards is None else cards, key=lambda card: _distance(card, properties))
    source = f"torch.cuda.get_device_properties of the measured {properties.name}"
    measured: dict[str, Any] = {
        "title": properties.name,
        "total_bytes": properties.total_bytes,
        "usable_bytes": properties.total_bytes,
        "compute_capability": properties.compute_capability,
        "sm_count": properties.sm_count,
        "l2_bytes": properties.l2_bytes,
        "threads_per_sm": properties.threads_per_sm,
        "shared_per_sm": properties.shared_per_sm,
        "shared_per_block_optin": properties.shared_per_block_optin,
    }
    sources = dict(nearest.sources) | dict.fromkeys(measured, source)
    sources["context_bytes"] = f"held outside the allocator in the measured runs on {properties.name}"
    return dataclasses.replace(nearest, **measured, context_bytes=context_bytes, sources=MappingProxyType(sources))


def _distance(card: Card, properties: DeviceProperties) -> tuple[int, int]:
    major, minor = card.compute_capability
    generations = abs((major - properties.major) * 10 + minor - properties.minor)
    return (generations, abs(card.total_bytes - properties.total_bytes))


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(read_properties())))
