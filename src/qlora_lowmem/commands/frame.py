"""What every command shares: the parser, errors as one message with an exit code, JSON to a file or standard output.

A command is a line of `commands.COMMANDS` and a module of this folder. It imports heavy libraries once it has checked
what it was given. Of the module, `run_command` takes

    __doc__                 what `--help` prints, its examples as `qlora-lowmem NAME ...`
    add_arguments(parser)   adds its flags; `--json` by `add_json_argument`
    run(options)            does it, with the parsed flags and, as `options.words`, the command line as it was given;
                            returns the exit code: 0 done, 2 usage, 3 does not fit. What it raises has its own

`python -m qlora_lowmem.explain` is a file of two lines, `commands.start(__name__, "explain")`. What runs a command in a
new process takes its first words from `environment.words_of("explain")`, so that it is recorded as it was typed.
"""

import argparse
import difflib
import errno
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import qlora_lowmem
from qlora_lowmem import targets
from qlora_lowmem.commands import COMMANDS
from qlora_lowmem.environment import SCRIPT, typed
from qlora_lowmem.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    QloraLowmemError,
    StoppedBySignal,
    UsageError,
)
from qlora_lowmem.files import json_values
from qlora_lowmem.recipe.other_names import OURS
from qlora_lowmem.signals import importing, unwinding

_ENDLESS = re.compile(r"\S{600,}")  # a path, say, which would fill the screen
# Of a path that a person gave, wherever it is used first: what is wrong with it is theirs to repair.
_OF_THE_PATH = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENXIO),
)

TRACEBACK_VARIABLE = "QLORA_LOWMEM_TRACEBACK"


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `UsageError`s that suggest the nearest flag. Flags are never abbreviated."""

    def __init__(self, prog: str, description: str = "") -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        for unknown in re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else ():
            flags, ours = list(self._option_string_actions), OURS.get(unknown.lstrip("-").replace("-", "_"), "")
            known = [flag for flag in flags if flag == f"--{ours.replace('_', '-')}"]
            near = known or difflib.get_close_matches(unknown, flags, n=1, cutoff=0.6)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{self.prog}: {message} ({self.prog} --help lists every flag)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The script `qlora-lowmem COMMAND ...`. Returns the exit code."""
    return guarded(lambda: _script(list(sys.argv[1:] if arguments is None else arguments)))


def _script(words: list[str]) -> int:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {each:<12} {line}" for each, (_, line) in COMMANDS.items())
        print(f"usage: {typed()} COMMAND [ARGUMENT ...]\n\n{qlora_lowmem.__doc__}\n\ncommands:", *lines, sep="\n")
        print(f"\n{typed('COMMAND')} --help shows a command's flags; {typed()} --version the version.")
        return EXIT_OK if words else EXIT_USAGE
    if name == "--version":
        print(f"{SCRIPT} {qlora_lowmem.__version__}")
        return EXIT_OK
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{typed()}: no command {name!r}{hint} ({typed()} --help lists every command)")
    return run_command(name, rest, f"{typed()} {name}")


def run_command(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command on the words of a command line (default: the process's). Returns the exit code; raises no error.

    Args:
        prog: how it was called (default: with `python -m`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = prog or f"python -m {COMMANDS[name][0]}"

    def run() -> int:
        try:
            os.getcwd()  # noqa: PTH109
        except FileNotFoundError:
            raise UsageError("the working directory does not exist any more; change into another one (cd)") from None
        module = _module(name)
        return int(module.run(parser_of(name, prog).parse_args(words, argparse.Namespace(words=words))))

    return guarded(run)


def parser_of(name: str, prog: str) -> argparse.ArgumentParser:
    """The command line of a command that is called as `prog`."""
    module = _module(name)
    parser = CommandParser(prog, (module.__doc__ or "").replace(f"{SCRIPT} {name}", prog))
    module.add_arguments(parser)
    return parser


def _module(name: str) -> Any:
    with importing():
        return importlib.import_module(f"qlora_lowmem.commands.{name.replace('-', '_')}")


def guarded(body: Callable[[], int]) -> int:
    """Turn what a command raises into one message and an exit code; no traceback reaches a user who asks for none."""
    # As it is imported, it tells of a faster CPU kernel that is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with unwinding():
            return body()
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        text, code = _told(error)
        text = _ENDLESS.sub(lambda word: f"{word[0][:80]}...{word[0][-40:]}", text)
        print(f"error: {text}", file=sys.stderr)
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            import traceback

            traceback.print_exc()
        return code


def _told(error: Exception) -> tuple[str, int]:
    """What a person is told of an error, and the exit code."""
    if isinstance(error, QloraLowmemError):
        return str(error), error.exit_code
    from qlora_lowmem.virtual_gpu import VirtualGPUError

    if isinstance(error, VirtualGPUError):
        return str(error), EXIT_USAGE
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_PATH:
        return f"{str(error.filename)!r}: {error.strerror}; make it usable, or give another", EXIT_USAGE
    again = f"Run again with {TRACEBACK_VARIABLE}=1 and report what it prints."
    failure = f"an unexpected failure: {type(error).__name__}: {error}\nThis is a fault of qlora_lowmem. {again}"
    return failure, EXIT_FAILURE


def whole_number(least: int, most: int = 2**24) -> Callable[[str], int]:
    """A flag's `type`: a whole number within bounds. The most is that of a recipe's `max_seq_length`, in tokens."""

    def read(text: str) -> int:
        if not re.fullmatch("[+-]?[0-9]+", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one from {least} to {most}")
        value = int(text[:30])  # beyond any bound already
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is too {'few' if value < least else 'many'}; give {least} to {most}"
            )
        return value

    return read


def add_json_argument(parser: argparse.ArgumentParser, *, checked: bool = True) -> None:
    """Add `--json FILE`, which is refused at once where nothing could be written later.

    Args:
        checked: False for a command that makes a folder which FILE may be in: it calls `check_json_target` itself.
    """
    about = "write a summary for machines; - is standard output"
    parser.add_argument("--json", metavar="FILE", type=check_json_target if checked else str, help=about)


def check_json_target(target: str | None, *, coming: Path | None = None) -> str | None:
    """`target`, if a `--json FILE` can be written there (`targets.check_file`)."""
    if target != "-":
        targets.check_file("--json", target, coming=coming)
    return target


def write_json(target: str | None, content: Any) -> None:
    """Write `content` to a file, whole or not at all (`UsageError`); `-` is standard output, None is nowhere."""
    text = json.dumps(json_values(content), indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        targets.write("--json", target, text)
