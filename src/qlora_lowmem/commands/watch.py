"""A running job's memory in the terminal: the card, the job's part, its allocator, the peak, the room that is left.

    qlora-lowmem watch                             the first GPU, with all that runs on it
    qlora-lowmem watch --output-dir outputs/mine   a job of qlora_lowmem.train, its allocator included
    qlora-lowmem watch --pid 4242                  any other program's process

Warns before the card or the job's own cap is full, and under Windows and WSL when the driver begins to use system
memory. Ends with the job or with whoever reads what it prints (exit code 0), or by Ctrl-C (130).
"""

import argparse
import json
import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from qlora_lowmem.commands import streams
from qlora_lowmem.commands.frame import whole_number
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.memory.profile import MEMORY_FILE
from qlora_lowmem.units import GIB, parse_memory_limit
from qlora_lowmem.watch.judgement import Frame, Watch
from qlora_lowmem.watch.readings import is_running
from qlora_lowmem.watch.view import line, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--output-dir", metavar="DIR", help=f"the output folder of a run: its {MEMORY_FILE} is read")
    what.add_argument("--pid", type=int, metavar="PID", help="a process: its part of the card, and it ends with it")
    parser.add_argument(
        "--gpu",
        type=whole_number(0, 1023),
        metavar="N",
        help="NVML's number of the GPU (default: where the job or process is, else 0)",
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
    if not (math.isfinite(options.interval) and options.interval >= 0.1):
        raise UsageError(f"--interval: {options.interval} is not a number of seconds from 0.1 on")
    try:
        parse_memory_limit(options.warn, GIB)
    except ValueError as fault:
        raise UsageError(f'--warn: {fault}; write "95%" or a size such as 5.5GiB') from None
    if options.pid is not None and not (options.pid > 0 and is_running(options.pid)):
        raise UsageError(f"--pid: no process {options.pid} runs here; it has ended, or runs in another container")
    watch = Watch(options.output_dir, options.pid, options.gpu, options.warn)
    console = Console()
    if options.json:
        return _follow(watch, options, lambda frame: print(json.dumps(frame.to_dict()), flush=True))
    if options.once:
        return _follow(watch, options, lambda frame: console.print(render(frame)))
    if not console.is_terminal:
        return _follow(watch, options, lambda frame: print(line(frame), flush=True))
    with Live(console=console, auto_refresh=False) as live:
        return _follow(watch, options, lambda frame: live.update(render(frame), refresh=True))


def _follow(watch: Watch, options: argparse.Namespace, show: Callable[[Frame], None]) -> int:
    while True:
        frame = watch.look()
        show(frame)
        if options.once or not frame.reading.running or streams.lost():  # nobody sees more of it
            return EXIT_OK
        time.sleep(options.interval)
