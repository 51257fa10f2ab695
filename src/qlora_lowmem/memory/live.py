"""What a running job says of its own memory: one small JSON file in its output folder, replaced whole.

`heartbeat.py` writes it, `watch/` reads it. Nothing here imports torch or touches a device.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qlora_lowmem.files import write_whole

MEMORY_FILE = "memory.json"

Phase = Literal["loading", "training", "ended"]

_JSON_TYPES: dict[Any, Any] = {int: int, float: (int, float)}


@dataclass(frozen=True)
class LiveMemory:
    """A job's newest reading. Bytes are integers; times are seconds since 1970.

    Attributes:
        pid, started: the process, and when it began: a later process may get the same pid.
        time: when this was read.
        recipe: the recipe's name.
        device: `cuda`, `virtual` or `cpu`; on a CPU all figures of a card are 0.
        card: the card's name.
        gpu: the GPU's UUID as NVML writes it; empty for `virtual` and `cpu`.
        phase: `loading`, `training` or `ended`.
        outcome: how it ended (`done`, `interrupted`, `out of GPU memory`, `failed`); empty until then.
        step, steps: optimizer steps done, and in all; 0 until training begins.
        allocated, reserved: what the caching allocator has given to tensors, and has taken from the card.
        peak_allocated, peak_reserved: the highest of both since the job began.
        outside: CUDA context and what libraries took past the allocator.
        limit: what the allocator may reserve at most.
        total: the card's memory as CUDA reports it.
    """

    pid: int
    started: float
    time: float
    recipe: str
    device: str
    card: str = ""
    gpu: str = ""
    phase: Phase = "loading"
    outcome: str = ""
    step: int = 0
    steps: int = 0
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    outside: int = 0
    limit: int = 0
    total: int = 0


def write_live(folder: Path, live: LiveMemory) -> None:
    """Replace the file in `folder`: a reader sees the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / MEMORY_FILE, json.dumps(asdict(live)) + "\n")


def read_live(folder: Path) -> LiveMemory:
    """The newest reading in `folder`.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is torn, or no job of this project wrote it.
    """
    content = json.loads((folder / MEMORY_FILE).read_text(encoding="utf-8"))
    types = {each.name: _JSON_TYPES.get(each.type, str) for each in fields(LiveMemory)}
    if not isinstance(content, dict) or content.keys() != types.keys():
        raise ValueError("its keys are not those of a job's memory")
    wrong = [name for name, kind in types.items() if not isinstance(content[name], kind)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {content[wrong[0]]!r}")
    return LiveMemory(**content)
