"""Every byte of a peak, by kind: what it comes to, as plain data. Nothing here touches a device."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.memory.profile import Provenance
from qlora_lowmem.memory.timeline import Timeline

_REPEATED = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_TENSOR = re.compile(r"\.(?:weight|bias|grad|quant_state|exp_avg|exp_avg_sq|step)\b.*$")


def block_of(name: str) -> str:
    """The block of the model that a tensor or module belongs to.

    The repeated block where there is one (`model.layers.4.mlp.up.weight` is in `model.layers.4`), else the module
    itself (`lm_head.weight` is in `lm_head`).
    """
    repeated = _REPEATED.match(name)
    return repeated.group(0) if repeated else _TENSOR.sub("", name)


@dataclass(frozen=True)
class OwnerLine:
    """Blocks of one kind that one line of code allocated.

    Attributes:
        kind: key in `kinds.KINDS`.
        line: `package/file.py:line function`, or the autograd node (`autograd: MulBackward0`).
        module: the module or tensor of the largest of them.
        layout: dtype and shape of the largest, where its tensor is known; else empty.
        bytes: requested, of all of them.
        blocks: how many.
    """

    kind: str
    line: str
    module: str
    layout: str
    bytes: int
    blocks: int


@dataclass(frozen=True)
class Attribution:
    """What a card held at the allocated peak of a phase, byte by byte.

    Attributes:
        device, provenance: as in `MemoryProfile`.
        phase: the phase whose peak it is.
        moment: where the step was then, `recompute of model.layers.39.mamba`.
        kinds: bytes by key of `kinds.KINDS`, zeros left out, in that order. They sum to `device_bytes`, and without
            the kinds `slack` and `outside` to `allocated_bytes`, exactly.
        allocated_bytes, reserved_bytes, device_bytes: the phase's peaks, as in `Peak`.
        owners: the lines of code that own most, largest first.
        modules: requested bytes of all that was alive at the peak, by block of the model (`block_of`); empty name:
            outside of the model.
        timeline: allocated bytes by kind over the step (the micro-batch in which the peak came).
        faults: events of the allocator's history that could not be followed; 0 unless torch's allocator has changed.
    """

    device: str
    provenance: Provenance
    phase: str
    moment: str
    kinds: Mapping[str, int]
    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    owners: tuple[OwnerLine, ...]
    timeline: Timeline
    faults: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises:
        ValueError: an unknown kind, a negative one, or kinds that do not sum to the peaks.
        """
        strange = [kind for kind, count in self.kinds.items() if kind not in KINDS or count < 0]
        if strange:
            raise ValueError(f"{', '.join(strange)}: not a kind, or a negative number of bytes")
        total = sum(self.kinds.values())
        outside = sum(self.kinds.get(kind, 0) for kind in OUTSIDE_ALLOCATED)
        if total != self.device_bytes or total - outside != self.allocated_bytes:
            raise ValueError(
                f"kinds sum to {total - outside} allocated and {total} in all; the peaks are {self.allocated_bytes} "
                f"and {self.device_bytes}"
            )

    @property
    def unexplained_share(self) -> float:
        """The part of the allocated peak that no kind claims, 0 to 1."""
        return self.kinds.get("unexplained", 0) / self.allocated_bytes if self.allocated_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"kinds": dict(self.kinds), "modules": dict(self.modules)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Attribution":
        """The inverse of `to_dict`."""
        owners = tuple(OwnerLine(**owner) for owner in content["owners"])
        return cls(**{**content, "owners": owners, "timeline": Timeline.from_dict(content["timeline"])})
