"""What the readings mean: headroom, whether the wall is near, whether the driver spills into system memory.

**Spilling.** On Linux `cudaMalloc` fails when the card is full; nothing of it goes to system memory. NVIDIA's driver
for Windows, which WSL uses too, goes on in system memory since 536.40, "when running close to maxing out GPU memory"
(https://nvidia.custhelp.com/app/answers/detail/a_id/5490), and does not say so. A process's memory is unknown to NVML
there (nvmlProcessInfo_t: "Under WDDM, NVML_VALUE_NOT_AVAILABLE is always reported"), so two figures are compared that
are known: what PyTorch's allocator has reserved, and what the card holds in all.

- What is reserved beyond all that the card holds cannot be on the card: a lower bound.
- From the reading on in which the card is full (`FULL_SHARE`), what the reserved bytes grew by more than the card's
  used bytes did: an estimate, since other programs may have given up their share at the same time.
"""

from dataclasses import dataclass
from typing import Literal

from qlora_lowmem.memory.live import LiveMemory
from qlora_lowmem.recipe.memory import parse_memory_limit
from qlora_lowmem.units import format_bytes
from qlora_lowmem.watch.readings import Reading, System

# NVIDIA says "close to maxing out" and gives no figure; this is ours.
FULL_SHARE = 0.95
STALE_SECONDS = 60.0
CARD = "the card"


@dataclass(frozen=True)
class Room:
    """Something that can be full: the card, or the allocator under its cap. Bytes."""

    name: str
    used: int
    limit: int

    @property
    def headroom(self) -> int:
        """What is left; below 0 for a cap that was lowered."""
        return self.limit - self.used


@dataclass(frozen=True)
class Spill:
    """What of the job's memory lies in system memory: none, impossible here, unknown, or an estimate in bytes."""

    state: Literal["none", "impossible", "unknown", "estimate"]
    bytes: int = 0


@dataclass(frozen=True)
class Notice:
    """What a person should know now: the `wall` is near, the driver begins to `spill`, the figures are `stale`."""

    kind: Literal["wall", "spill", "stale"]
    text: str


def rooms(reading: Reading) -> tuple[Room, ...]:
    """What can be full, nearest to its wall first."""
    found = []
    if reading.card is not None:
        found.append(Room(CARD, reading.card.used, reading.card.total))
    elif reading.job is not None and reading.job.total:
        found.append(Room(CARD, reading.job.reserved + reading.job.outside, reading.job.total))
    if reading.job is not None and reading.job.limit:
        found.append(Room("the job's cap", reading.job.reserved, reading.job.limit))
    return tuple(sorted(found, key=lambda room: room.headroom))


def headroom(reading: Reading) -> int | None:
    """Bytes to the nearest wall; None where nothing is known of a card."""
    return next((room.headroom for room in rooms(reading)), None)


def full_since(before: Reading | None, now: Reading) -> Reading | None:
    """The reading from which on the card has been full without a break; `before` is the answer for the last reading."""
    full = now.card is not None and now.job is not None and now.card.used >= FULL_SHARE * now.card.total
    return (before or now) if full else None


def spill(now: Reading, full: Reading | None, system: System) -> Spill:
    """What lies in system memory. `full` is `full_since`'s answer for `now`; the module says what is compared."""
    if system == "linux":
        return Spill("impossible")
    if now.job is None or now.card is None:
        return Spill("unknown")
    estimate = now.job.reserved - now.card.used
    if full is not None and full.job is not None and full.card is not None:
        grown, taken = now.job.reserved - full.job.reserved, now.card.used - full.card.used
        estimate = max(estimate, grown - taken)
    return Spill("estimate", estimate) if estimate > 0 else Spill("none")


def notices(now: Reading, spilled: Spill, system: System, warn: str | int) -> tuple[Notice, ...]:
    """What to say of a reading, the gravest first.

    Args:
        warn: where a wall is near: a share of what can be full ("95%"), or bytes used.
    """
    found = []
    if spilled.state == "estimate":
        text = (
            f"about {format_bytes(spilled.bytes)} of the job lie in system memory, which is many times slower. Make "
            "the job smaller, close other programs, or set the driver's CUDA Sysmem Fallback Policy to Prefer No "
            "Sysmem Fallback"
        )
        found.append(Notice("spill", text))
    near = [room for room in rooms(now) if room.used >= parse_memory_limit(warn, room.limit)]
    if near:
        found.append(Notice("wall", _near_wall(near[0], now.job, system)))
    if now.running and now.job is not None and now.job.phase != "ended" and now.time - now.job.time > STALE_SECONDS:
        age = f"{now.time - now.job.time:.0f} s"
        found.append(
            Notice("stale", f"the job's own figures are {age} old: it loads, a micro-step takes that long, or it hangs")
        )
    return tuple(found)


def _near_wall(room: Room, job: LiveMemory | None, system: System) -> str:
    share = 100 * room.used / room.limit
    text = f"{room.name} is {share:.1f} % full: {format_bytes(room.used)} of {format_bytes(room.limit)}"
    if job is not None and job.reserved > job.allocated:
        text += f", {format_bytes(job.reserved - job.allocated)} of it PyTorch's cache, which it frees first"
    if room.name == CARD and system != "linux":
        return f"{text}. Beyond it Windows' driver goes on in system memory"
    return f"{text}. Beyond it the job fails with an out-of-memory error"
