"""What every command shares: errors as one message with an exit code, JSON to a file or standard output."""

import argparse
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    QloraLowmemError,
    StoppedBySignal,
    UsageError,
)
from qlora_lowmem.files import write_whole

TRACEBACK_VARIABLE = "QLORA_LOWMEM_TRACEBACK"


def run_command(body: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command's body and turn what it raises into one message and an exit code; no traceback reaches a user."""
    # As it is imported, it tells of a faster CPU kernel that is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return body(arguments)
    except StoppedBySignal as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except QloraLowmemError as error:
        return _fail(error, error.exit_code)
    except virtual_gpu.VirtualGPUError as error:
        return _fail(error, EXIT_USAGE)
    except Exception as error:  # anything else is ours to repair, and is told as such
        print(
            f"error: an unexpected failure: {type(error).__name__}: {error}\n"
            f"This is a fault of qlora_lowmem. Run again with {TRACEBACK_VARIABLE}=1 and report what it prints.",
            file=sys.stderr,
        )
        _show_traceback()
        return EXIT_FAILURE


def _fail(error: Exception, exit_code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    _show_traceback()
    return exit_code


def _show_traceback() -> None:
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exc()


def add_json_argument(parser: argparse.ArgumentParser, *, checked: bool = True) -> None:
    """Add `--json FILE`, which is refused at once where nothing could be written later.

    Args:
        checked: False for a command that makes a folder which FILE may be in: it calls `check_json_target` itself.
    """
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=_json_target if checked else str,
        help="write a summary for machines; - is standard output",
    )


def _json_target(target: str) -> str:
    """argparse names the flag itself."""
    reason = _why_not_a_file(target)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{target!r} cannot be written ({reason}); give another file")
    return target


def check_json_target(target: str | None, *, coming: Path | None = None) -> None:
    """Refuse a `--json FILE` that cannot be written, before hours of work for it.

    Args:
        coming: a folder that the command will make; what is to be in it can be told only then.

    Raises:
        UsageError: nothing can be written there.
    """
    if target is None:
        return
    parent = Path(os.path.realpath(target)).parent
    if target and coming is not None and not parent.exists() and parent == Path(os.path.realpath(coming)):
        return
    reason = _why_not_a_file(target)
    if reason is not None:
        raise _cannot_write(target, reason)


def _cannot_write(target: str, reason: str) -> UsageError:
    return UsageError(f"--json: {target!r} cannot be written ({reason}); give another file")


def _why_not_a_file(target: str) -> str | None:
    """Why `write_json` would fail; found out as it writes, by a scratch file beside the target."""
    if target == "-":
        return None
    if not target.strip():
        return "it is empty"
    try:
        if Path(target).is_dir():
            return "it is a folder"
        if not _is_special(target):
            scratch = _scratch(target)
            scratch.touch()
            scratch.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_special(target: str) -> bool:
    """Whether it is a pipe or a device, which is written into and not replaced."""
    return Path(target).exists() and not Path(target).is_file()


def _scratch(target: str) -> Path:
    path = Path(os.path.realpath(target))
    return path.with_name(f".{path.name}.{os.getpid()}")


def check_new_folder(flag: str, target: str) -> Path:
    """The folder that a command will make, made sure of before there is work to lose.

    Raises:
        UsageError: it is there already and holds something, or cannot be made there.
    """
    path = Path(os.path.realpath(target)) if target.strip() else None
    if path is None:
        raise UsageError(f"{flag}: {target!r} names no folder; give a new one")
    try:
        if path.exists() and (not path.is_dir() or path == Path.cwd() or any(path.iterdir())):
            raise UsageError(f"{flag}: {target!r} exists already; give a new folder")
        with tempfile.TemporaryDirectory(dir=next(each for each in path.parents if each.exists())):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{flag}: {target!r} cannot be written ({reason}); give another folder") from None
    return Path(target)


def write_json(target: str | None, content: dict[str, Any]) -> None:
    """Write `content` to the file `target`, whole or not at all; `-` is standard output, None is nowhere.

    Raises:
        UsageError: the file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        if _is_special(target):
            Path(target).write_text(text, encoding="utf-8")
            return
        write_whole(Path(target), text)
    except OSError as error:
        raise _cannot_write(target, error.strerror or str(error)) from None
