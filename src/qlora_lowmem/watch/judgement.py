"""What the readings mean: headroom, whether the wall is near, whether the driver spills into system memory.

**Spilling.** On Linux `cudaMalloc` fails when the card is full. NVIDIA's driver for Windows, which WSL uses too, goes
on in system memory since 536.40, "when running close to maxing out GPU memory"
(https://nvidia.custhelp.com/app/answers/detail/a_id/5490), and does not say so. NVML knows no process's memory there
(nvmlProcessInfo_t: "Under WDDM, NVML_VALUE_NOT_AVAILABLE is always reported"), so what PyTorch's allocator has reserved
is compared with what the card holds in all.

- What is reserved beyond all that the card holds cannot be on the card: a lower bound.
- From the reading on in which the card is full (`FULL_SHARE`), what the reserved bytes grew by more than the card's
  used bytes did: an estimate, since other programs may have given up their share at the same time.
"""

import contextlib
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_lowmem.errors import UsageError
from qlora_lowmem.memory.profile import MEMORY_FILE, LiveMemory, read_live
from qlora_lowmem.units import format_bytes, parse_memory_limit
from qlora_lowmem.watch.readings import Nvml, Reading, System, card_of, is_running, look, system

# NVIDIA says "close to maxing out" and gives no figure; this is ours.
FULL_SHARE = 0.95
STALE_SECONDS = 60.0
CARD = "the card"
_HISTORY = 60


@dataclass(frozen=True)
class Room:
    """Something that can be full: the card, or the allocator under its cap. Bytes; a cap may be below what is used."""

    name: str
    used: int
    limit: int

    @property
    def headroom(self) -> int:
        """What is left."""
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
    card, job = reading.card, reading.job
    total = card.total if card is not None else job.total if job is not None else 0
    found = [Room(CARD, card_bytes(reading), total)] if total else []
    if job is not None and job.limit:
        found.append(Room("the job's cap", job.reserved, job.limit))
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
    """What to say of a reading, the gravest first; a wall is near from `warn` on: a share ("95%"), or bytes used."""
    found = []
    if spilled.state == "estimate":
        text = (
            f"about {format_bytes(spilled.bytes)} of the job lie in system memory, which is many times slower. Make "
            "the job smaller, close other programs, or set the driver's CUDA Sysmem Fallback Policy to Prefer No "
            "Sysmem Fallback"
        )
        found.append(Notice("spill", text))
    if near := [room for room in rooms(now) if room.used >= parse_memory_limit(warn, room.limit)]:
        found.append(Notice("wall", _near_wall(near[0], now.job, system)))
    if now.running and now.job is not None and now.job.phase != "ended" and now.time - now.job.time > STALE_SECONDS:
        why = "it loads, a micro-step takes that long, or it hangs"
        found.append(Notice("stale", f"the job's own figures are {now.time - now.job.time:.0f} s old: {why}"))
    return tuple(found)


def _near_wall(room: Room, job: LiveMemory | None, system: System) -> str:
    share = 100 * room.used / room.limit
    text = f"{room.name} is {share:.1f} % full: {format_bytes(room.used)} of {format_bytes(room.limit)}"
    if job is not None and job.reserved > job.allocated:
        text += f", {format_bytes(job.reserved - job.allocated)} of it PyTorch's cache, which it frees first"
    goes_on = room.name == CARD and system != "linux"
    beyond = "Windows' driver goes on in system memory" if goes_on else "the job fails with an out-of-memory error"
    return f"{text}. Beyond it {beyond}"


@dataclass(frozen=True)
class Frame:
    """A reading with what it means.

    Attributes:
        peak: the most that the card has held while watched, in bytes; for a job on no real card, what it said.
        history: what the card held, look by look, oldest first, in bytes.
    """

    reading: Reading
    spill: Spill
    notices: tuple[Notice, ...]
    peak: int
    history: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; bytes are integers."""
        content = asdict(self.reading) | {"peak_bytes": self.peak, "headroom_bytes": headroom(self.reading)}
        content |= {"spill": asdict(self.spill), "notices": [asdict(notice) for notice in self.notices]}
        if card := self.reading.card:
            content["card"]["processes"] = [{"pid": pid, "bytes": size} for pid, size in card.processes.items()]
        return content


def card_bytes(reading: Reading) -> int:
    """What the card holds in all: by NVML, else what the job says that it takes."""
    if reading.card is not None:
        return reading.card.used
    return reading.job.reserved + reading.job.outside if reading.job is not None else 0


class Watch:
    """What is watched, look by look: the card, and the job or process on it.

    Raises:
        UsageError: there is no job in the folder, or no GPU to look at.
        QloraLowmemError: while looking, the card answers no longer.
    """

    def __init__(self, output_dir: str | None, pid: int | None, gpu: int | None, warn: str | int) -> None:
        self._warn = warn
        self._folder = Path(output_dir) if output_dir is not None else None
        self._job = _first_word(self._folder) if self._folder is not None else None
        self._pid = self._job.pid if self._job is not None else pid
        self._gpu, self._system = gpu, system()
        self._nvml: Nvml | None = None
        self._find_card()
        self._full: Reading | None = None
        self._peak = 0
        self._history: deque[int] = deque(maxlen=_HISTORY)

    def look(self) -> Frame:
        """One look, and what it means with those before."""
        self._listen()
        self._find_card()
        reading = look(self._nvml, self._job, self._pid)
        self._full = full_since(self._full, reading)
        spilled = spill(reading, self._full, self._system)
        self._peak = max(self._peak, card_bytes(reading))
        if reading.card is None and reading.job is not None:
            self._peak = max(self._peak, reading.job.peak_reserved + reading.job.outside)
        self._history.append(card_bytes(reading))
        said = notices(reading, spilled, self._system, self._warn)
        return Frame(reading, spilled, said, self._peak, tuple(self._history))

    def _find_card(self) -> None:
        """Open the card as soon as it is known which: a job says so once it has one."""
        if self._nvml is not None:
            return
        if self._gpu is not None:
            self._nvml = Nvml(self._gpu)
        elif self._job is None:
            self._nvml = Nvml(card_of(self._pid) if self._pid is not None else 0)
        elif self._job.gpu and is_running(self._job.pid, self._job.started):
            with contextlib.suppress(UsageError):  # the driver may not answer in a container; the job still does
                self._nvml = Nvml(self._job.gpu)

    def _listen(self) -> None:
        """The job's newest word; the last one while there is no better, or another process writes there."""
        if self._folder is None or self._job is None:
            return
        with contextlib.suppress(OSError, ValueError):
            newest = read_live(self._folder)
            self._job = newest if newest.pid == self._job.pid else self._job


def _first_word(folder: Path) -> LiveMemory:
    try:
        return read_live(folder)
    except FileNotFoundError:
        raise UsageError(
            f"--output-dir: {str(folder)!r} has no {MEMORY_FILE}, which a job of qlora_lowmem.train writes from its "
            "start on; give that job's output folder, or --pid for any other program"
        ) from None
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UsageError(
            f"--output-dir: {str(folder / MEMORY_FILE)!r} cannot be read ({reason}); no job of this version wrote it"
        ) from None
