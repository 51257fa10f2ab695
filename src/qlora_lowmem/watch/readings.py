"""One look at a card and a job: what NVML says of the card, what the process is, what our job says of itself."""

import contextlib
import platform
import time
from dataclasses import dataclass
from typing import Literal

import psutil
import pynvml

from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.memory.profile import LiveMemory

System = Literal["linux", "wsl", "windows"]

# A process's start as two programs read it may differ by the clock's corrections in between.
_SAME_START_SECONDS = 10.0


@dataclass(frozen=True)
class CardReading:
    """A card as NVML sees it, in bytes.

    Attributes:
        processes: pid to its bytes on this card; None is a process whose memory NVML does not tell, as under Windows
            and WSL. In a container it may know other pids than ours.
    """

    name: str
    uuid: str
    total: int
    used: int
    free: int
    processes: dict[int, int | None]


@dataclass(frozen=True)
class Reading:
    """All that one look found.

    Attributes:
        time: seconds since 1970.
        running: whether the process is there; True where none is watched.
        card: None where the job is on no real card (`virtual`, `cpu`) or no driver answers.
        process_bytes: the process's bytes on the card, by NVML; None where it does not tell.
        resident_bytes: the process's bytes of host memory; None where no process is watched or it has ended.
        job: what our job last said; None for a program that is not ours.
    """

    time: float
    running: bool
    card: CardReading | None
    process_bytes: int | None
    resident_bytes: int | None
    job: LiveMemory | None


class Nvml:
    """One card of this machine, by number or by UUID; `count` is how many there are.

    Raises:
        UsageError: no driver, or no such card.
    """

    def __init__(self, card: int | str) -> None:
        try:
            pynvml.nvmlInit()
            self.count = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            raise UsageError(
                f"no NVIDIA GPU answers here (NVML: {error}). Run this on the machine with the GPU, or give "
                "--output-dir, the output folder of a run of qlora_lowmem.train, which writes its own figures"
            ) from None
        if isinstance(card, int) and not 0 <= card < self.count:
            raise UsageError(f"--gpu: there is no GPU {card}; this machine has {self.count}, numbered from 0")
        find = pynvml.nvmlDeviceGetHandleByIndex if isinstance(card, int) else pynvml.nvmlDeviceGetHandleByUUID
        try:
            self._handle = find(card)
        except pynvml.NVMLError as error:
            raise UsageError(f"the GPU {card} does not answer (NVML: {error}); choose another with --gpu") from None

    def read(self) -> CardReading:
        """The card now. Raises QloraLowmemError: it answers no longer."""
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            name, uuid = pynvml.nvmlDeviceGetName(self._handle), pynvml.nvmlDeviceGetUUID(self._handle)
        except pynvml.NVMLError as error:
            raise QloraLowmemError(f"the GPU answers no longer (NVML: {error})") from None
        found: dict[int, int | None] = {}
        for ask in (pynvml.nvmlDeviceGetGraphicsRunningProcesses, pynvml.nvmlDeviceGetComputeRunningProcesses):
            with contextlib.suppress(pynvml.NVMLError):  # not every driver tells (WSL)
                found |= {int(each.pid): each.usedGpuMemory for each in ask(self._handle)}
        return CardReading(str(name), str(uuid), int(memory.total), int(memory.used), int(memory.free), found)


def card_of(pid: int) -> int:
    """The number of the first GPU that has the process; 0 where none tells of it. Raises UsageError: no driver."""
    return next((number for number in range(Nvml(0).count) if pid in Nvml(number).read().processes), 0)


def is_running(pid: int, started: float | None = None) -> bool:
    """Whether the process is there, and is the one that began at `started` (seconds since 1970; None is any)."""
    try:
        process = psutil.Process(pid)
        alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return alive and (started is None or abs(process.create_time() - started) < _SAME_START_SECONDS)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # another user's


def look(nvml: Nvml | None, job: LiveMemory | None, pid: int | None) -> Reading:
    """One reading of the card, the job and the process, each where there is one.

    Raises:
        QloraLowmemError: the card answers no longer.
    """
    running = pid is None or is_running(pid, job.started if job else None)
    card = nvml.read() if nvml is not None else None
    on_card = card.processes.get(pid) if card is not None and pid is not None else None
    resident = None
    with contextlib.suppress(psutil.Error):  # gone, or another user's
        resident = int(psutil.Process(pid).memory_info().rss) if pid is not None and running else None
    return Reading(time.time(), running, card, on_card, resident, job)


def system() -> System:
    """The system whose driver decides what happens when the card is full. WSL uses Windows' driver."""
    if platform.system() == "Windows":
        return "windows"
    return "wsl" if "microsoft" in platform.release().lower() else "linux"
