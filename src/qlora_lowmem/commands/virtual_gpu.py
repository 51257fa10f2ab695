"""Any program that uses PyTorch on a virtual GPU: real operators and allocator, a named card's memory.

    qlora-lowmem virtual-gpu --card rtx-4050-laptop-6gb -- python train.py --epochs 1

Nothing is computed: values are zeros. Passes the program's exit code through, and tells its peaks.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import add_json_argument, write_json
from qlora_lowmem.errors import EXIT_OK, EXIT_USAGE, UsageError
from qlora_lowmem.units import GIB
from qlora_lowmem.virtual_gpu.account import Report
from qlora_lowmem.virtual_gpu.cards import Card, all_cards, card_row, get_card, parse_size
from qlora_lowmem.virtual_gpu.launch import PROGRAM, search_path

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --card NAME [options] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("--card", metavar="NAME", help="which card; --list-cards shows them")
    parser.add_argument("--count", metavar="N", type=_positive, default=1, help="how many such cards (default 1)")
    parser.add_argument("--memory", metavar="SIZE", type=_size, help="how much memory it has: 8GiB, 24GB, bytes")
    add_json_argument(parser)
    parser.add_argument("--list-cards", action="store_true", help="show the table of cards and end")
    parser.add_argument(
        "--print-card", action="store_true", help="measure this machine's own GPU: its row of cards.toml"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="the program and its arguments, after --")


def run(options: argparse.Namespace) -> int:
    """The program's own exit code; 128 + n if signal n ended it; 2 if it ended well and never asked for a card."""
    if options.list_cards:
        print(_card_table())
        return EXIT_OK
    if options.print_card:
        print(card_row())
        return EXIT_OK
    if options.card is None:
        raise UsageError("--card is missing; --list-cards shows the cards")
    if not options.command:
        raise UsageError("the command to run is missing; put it after --, as in -- python train.py")
    command = _with_this_python(options.command)
    if command[0] != PROGRAM and shutil.which(command[0], path=search_path(os.environ)) is None:
        raise UsageError(f"the command {command[0]!r} is not found; put it after --, as in -- python train.py")
    card = get_card(options.card)
    if options.memory is not None:
        try:
            card = card.with_memory(options.memory)
        except ValueError as error:
            raise UsageError(f"--memory: {error}") from None
    try:
        report = virtual_gpu.run(command, card, count=options.count)
    except OSError as error:
        raise UsageError(f"{command[0]!r} cannot be started on a virtual GPU: {error}") from None
    if report.reached:
        _print_summary(report, card)
    else:
        print(_NOT_REACHED, file=sys.stderr)
    write_json(options.json, report.to_json())
    return report.exit_code if report.reached else report.exit_code or EXIT_USAGE


def _with_this_python(command: list[str]) -> list[str]:
    """`python` is the interpreter that runs this: the virtual GPU is made for its PyTorch."""
    if command[0] not in ("python", "python3"):
        return command
    found = shutil.which(command[0])
    if found is not None and Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        said = f"{command[0]} is {sys.executable}, which runs this command, and not {found}: that one by its path"
        print(f"virtual GPU: {said}", file=sys.stderr)
    return [sys.executable, *command[1:]]


def _print_summary(report: Report, card: Card) -> None:
    def gib(count: int) -> str:
        return f"{count / GIB:.3f} GiB"

    known = (
        "" if report.complete else " (a process was killed or not seen: allocated and reserved are what was last known)"
    )
    print(
        f"virtual {card.name}: peak allocated {gib(report.peak_allocated_bytes)}, reserved "
        f"{gib(report.peak_reserved_bytes)}, device {gib(report.peak_device_bytes)} of {gib(card.total_bytes)} "
        f"with {gib(report.context_bytes)} of context{known}; {report.launches.total:,} launches",
        file=sys.stderr,
    )


def _card_table() -> str:
    rows = [("card", "memory GiB", "usable GiB", "context MiB", "capability", "SMs")]
    for card in all_cards():
        capability = ".".join(map(str, card.compute_capability))
        memory, usable = f"{card.total_bytes / GIB:.2f}", f"{card.usable_bytes / GIB:.2f}"
        context = f"{card.context_bytes / 2**20:.0f}"
        rows.append((card.name, memory, usable, context, capability, str(card.sm_count)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
