"""Records for tests of what compares them."""

import dataclasses
from typing import Any

from qlora_lowmem.gate.records import difference
from qlora_lowmem.memory.kinds import OUTSIDE_ALLOCATED
from qlora_lowmem.results.kinds.verdicts import Key, Record

KEY = Key(
    device="rtx-4050-laptop-6gb",
    provenance="virtual",
    torch="2.14.1+cu130",
    cuda="13.0",
    transformers="5.23.0",
    peft="0.21.2",
    trl="1.16.0",
    bitsandbytes="0.50.2",
    allocator="expandable_segments:False",
    recipe="99e7bc178a0f",
)


def record(allocated: int = 1000, key: Key = KEY, **change: Any) -> Record:
    """A record of that many bytes, half of them weights and half activations."""
    plain = Record(
        key=key,
        allocated=allocated,
        reserved=2048,
        device=4096,
        phases={"load": allocated // 2, "steady": allocated},
        kinds={"weights_other": allocated // 2, "activations_mlp": allocated - allocated // 2},
        modules={"layers.0": allocated // 2, "layers.1": allocated - allocated // 2},
        lines={"activations_mlp | model.py:12 forward": allocated // 2},
        versions={"python": "3.11.7", "transformers": key.transformers},
    )
    return dataclasses.replace(plain, **change)


def grown(before: Record, after: Record) -> dict[str, int]:
    """How much the kinds of the allocated peak changed, most first; negative for less."""
    return {c.name: c.bytes for c in difference(before, after).kinds if c.name not in OUTSIDE_ALLOCATED}
