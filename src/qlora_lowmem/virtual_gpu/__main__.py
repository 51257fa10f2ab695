"""`python -m qlora_lowmem.virtual_gpu --card NAME -- python SCRIPT.py ARGS...`: any program on a virtual GPU."""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .account import Report
from .cards import Card, UnknownCardError, VirtualGPUError, all_cards, card_row, get_card, parse_size
from .launch import PROGRAM, run, search_path

_GIB = 2**30
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_NOT_REACHED = (
    "virtual GPU: the program asked for no card, so there are no peaks to tell. It computes on the CPU, its Python has "
    "no CUDA build of PyTorch, or LD_PRELOAD was lost on its way (env -i, sudo, a program that is linked statically)."
)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of cards; a virtual machine has 1 to 16")
    return int(text)


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage text is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(_EXIT_USAGE, f"{self.prog}: {message} (--help shows how it is used)\n")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog=prog,
        usage="%(prog)s --card NAME [options] -- COMMAND [ARGUMENT ...]",
        description=(
            "Runs a program that uses PyTorch on a virtual GPU: real operators and allocator, a named card's memory, "
            "no computation (values are zeros). Passes the program's exit code through, and tells its peaks."
        ),
        epilog="example: %(prog)s --card rtx-4050-laptop-6gb -- python train.py --epochs 1",
    )
    parser.add_argument("--card", metavar="NAME", help="which card; --list-cards shows them")
    parser.add_argument("--count", metavar="N", type=_positive, default=1, help="how many such cards (default 1)")
    parser.add_argument("--memory", metavar="SIZE", type=_size, help="how much memory it has: 8GiB, 24GB, bytes")
    parser.add_argument("--json", metavar="FILE", help="write the report there as JSON; - for standard output")
    parser.add_argument("--list-cards", action="store_true", help="show the table of cards and end")
    parser.add_argument(
        "--print-card", action="store_true", help="measure this machine's own GPU: its row of cards.toml"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="the program and its arguments, after --")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m qlora_lowmem.virtual_gpu") -> int:
    """Runs the command line, called as `prog`; returns the exit code.

    The program's own; 128 + n if signal n ended it; 130 when interrupted; 2 for a wrong command line, a machine that
    cannot host a virtual GPU, or a program that ended well and never asked for a card.
    """
    # Ending takes the program along: the default action would leave it running.
    signal.signal(signal.SIGTERM, _terminate)
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    try:
        if options.list_cards:
            print(_card_table())
            return 0
        if options.print_card:
            print(card_row())
            return 0
        if options.card is None:
            parser.error("--card is missing; --list-cards shows the cards")
        if not options.command:
            parser.error("the command to run is missing; put it after --, as in -- python train.py")
        command = _with_this_python(options.command)
        if command[0] != PROGRAM and shutil.which(command[0], path=search_path(os.environ)) is None:
            parser.error(f"the command {command[0]!r} is not found; put it after --, as in -- python train.py")
        card = get_card(options.card)
        if options.memory is not None:
            card = card.with_memory(options.memory)
        if options.json not in (None, "-"):
            Path(options.json).touch()
        report = run(command, card, count=options.count)
    except (VirtualGPUError, ValueError, OSError) as error:
        prefix = "" if isinstance(error, UnknownCardError) else "virtual GPU: "
        parser.exit(_EXIT_USAGE, f"{prefix}{error}\n")
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    if options.json is not None:
        _write_json(report, options.json)
    if not report.reached:
        print(_NOT_REACHED, file=sys.stderr)
        return report.exit_code or _EXIT_USAGE
    _print_summary(report, card)
    return report.exit_code


def _with_this_python(command: list[str]) -> list[str]:
    """`python` is the interpreter that runs this: the virtual GPU is made for its PyTorch."""
    if command[0] not in ("python", "python3"):
        return command
    found = shutil.which(command[0])
    if found is not None and Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        said = f"{command[0]} is {sys.executable}, which runs this command, and not {found}: that one by its path"
        print(f"virtual GPU: {said}", file=sys.stderr)
    return [sys.executable, *command[1:]]


def _terminate(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _print_summary(report: Report, card: Card) -> None:
    def gib(count: int) -> str:
        return f"{count / _GIB:.3f} GiB"

    known = (
        "" if report.complete else " (a process was killed or not seen: allocated and reserved are what was last known)"
    )
    print(
        f"virtual {card.name}: peak allocated {gib(report.peak_allocated_bytes)}, reserved "
        f"{gib(report.peak_reserved_bytes)}, device {gib(report.peak_device_bytes)} of {gib(card.total_bytes)} "
        f"with {gib(report.context_bytes)} of context{known}",
        file=sys.stderr,
    )


def _write_json(report: Report, target: str) -> None:
    text = json.dumps(report.to_json(), indent=2)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def _card_table() -> str:
    rows = [("card", "memory GiB", "usable GiB", "context MiB", "capability", "SMs")]
    for card in all_cards():
        capability = ".".join(map(str, card.compute_capability))
        memory, usable = f"{card.total_bytes / _GIB:.2f}", f"{card.usable_bytes / _GIB:.2f}"
        context = f"{card.context_bytes / 2**20:.0f}"
        rows.append((card.name, memory, usable, context, capability, str(card.sm_count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


if __name__ == "__main__":
    sys.exit(main())
