"""A running job's memory in the terminal: the card, the job's part, its allocator, the peak, the room that is left.

    qlora-lowmem watch                             the first GPU, with all that runs on it
    qlora-lowmem watch --output-dir outputs/mine   a job of qlora_lowmem.train, its allocator included
    qlora-lowmem watch --pid 4242                  any other program's process

Warns before the card or the job's own cap is full, and under Windows and WSL when the driver begins to use system
memory. Ends with the job (exit code 0), or by Ctrl-C (130).
"""

import argparse
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from qlora_lowmem.commands.frame import Command
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.memory.live import MEMORY_FILE, LiveMemory, read_live
from qlora_lowmem.recipe.memory import parse_memory_limit
from qlora_lowmem.units import GIB
from qlora_lowmem.watch import judgement
from qlora_lowmem.watch.readings import Nvml, Reading, card_of, is_running, look, system
from qlora_lowmem.watch.view import Frame, card_bytes, line, render

_HISTORY = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--output-dir", metavar="DIR", help=f"the output folder of a run: its {MEMORY_FILE} is read")
    what.add_argument("--pid", type=int, metavar="PID", help="a process: its part of the card, and it ends with it")
    parser.add_argument(
        "--gpu", type=int, metavar="N", help="NVML's number of the GPU (default: where the job or process is, else 0)"
    )
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default 1)")
    parser.add_argument(
        "--warn",
        default="95%",
        metavar="SIZE",
        help="warn from here on: a share of the card and of the job's cap, or a size such as 5.5GiB (default 95%%)",
    )
    parser.add_argument("--once", action="store_true", help="one look, then end")
    parser.add_argument("--json", action="store_true", help="a JSON object a look, one a line, instead of the view")


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code: 0 the job ended, 2 nothing to watch, 130 interrupted."""
    _check(options)
    watch = Watch(options.output_dir, options.pid, options.gpu, options.interval, options.warn)
    console = Console()
    if options.json:
        return _follow(watch, options.once, lambda frame: print(json.dumps(frame.to_dict()), flush=True))
    if options.once:
        return _follow(watch, True, lambda frame: console.print(render(frame)))
    if not console.is_terminal:
        return _follow(watch, False, lambda frame: print(line(frame), flush=True))
    with Live(console=console, auto_refresh=False) as live:
        return _follow(watch, False, lambda frame: live.update(render(frame), refresh=True))


def _check(options: argparse.Namespace) -> None:
    if not (math.isfinite(options.interval) and options.interval >= 0.1):
        raise UsageError(f"--interval: {options.interval} is not a number of seconds from 0.1 on")
    try:
        parse_memory_limit(options.warn, GIB)
    except ValueError as fault:
        raise UsageError(f'--warn: {fault}; write "95%" or a size such as 5.5GiB') from None
    if options.pid is not None and not (options.pid > 0 and is_running(options.pid)):
        raise UsageError(f"--pid: no process {options.pid} runs here; it has ended, or runs in another container")


def _follow(watch: "Watch", once: bool, show: Callable[[Frame], None]) -> int:
    while True:
        frame = watch.look()
        show(frame)
        if once or not frame.reading.running:
            return EXIT_OK
        time.sleep(watch.interval)


class Watch:
    """What is watched, look by look: the card, and the job or process on it.

    Raises:
        UsageError: there is no job in the folder, or no GPU to look at.
        QloraLowmemError: while looking, the card answers no longer.
    """

    def __init__(
        self, output_dir: str | None, pid: int | None, gpu: int | None, interval: float, warn: str | int
    ) -> None:
        self.interval = interval
        self._warn = warn
        self._folder = Path(output_dir) if output_dir is not None else None
        self._job = _first_word(self._folder) if self._folder is not None else None
        self._pid = self._job.pid if self._job is not None else pid
        self._gpu = gpu
        self._nvml: Nvml | None = None
        self._find_card()
        self._system = system()
        self._full: Reading | None = None
        self._peak = 0
        self._history: deque[int] = deque(maxlen=_HISTORY)

    def look(self) -> Frame:
        """One look, and what it means with those before."""
        self._listen()
        self._find_card()
        reading = look(self._nvml, self._job, self._pid)
        self._full = judgement.full_since(self._full, reading)
        spilled = judgement.spill(reading, self._full, self._system)
        self._peak = max(self._peak, card_bytes(reading))
        if reading.card is None and reading.job is not None:
            self._peak = max(self._peak, reading.job.peak_reserved + reading.job.outside)
        self._history.append(card_bytes(reading))
        said = judgement.notices(reading, spilled, self._system, self._warn)
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
        try:
            newest = read_live(self._folder)
        except (OSError, ValueError):
            return
        if newest.pid == self._job.pid:
            self._job = newest


def _first_word(folder: Path) -> LiveMemory:
    try:
        return read_live(folder)
    except FileNotFoundError:
        raise UsageError(
            f"--output-dir: {str(folder)!r} has no {MEMORY_FILE}, which a job of qlora_lowmem.train writes from its "
            "start on; give that job's output folder, or --pid for any other program"
        ) from None
    except (OSError, ValueError) as fault:
        raise UsageError(
            f"--output-dir: {str(folder / MEMORY_FILE)!r} cannot be read ({fault}); no job of this version wrote it"
        ) from None


COMMAND = Command("watch", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
