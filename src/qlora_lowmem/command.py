"""What every command shares: errors as one message with an exit code, JSON to a file or standard output."""

import argparse
import json
import os
import sys
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

TRACEBACK_VARIABLE = "QLORA_LOWMEM_TRACEBACK"


def run_command(body: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command's body and turn what it raises into one message and an exit code; no traceback reaches a user."""
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


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`."""
    parser.add_argument("--json", metavar="FILE", help="write a summary for machines; - is standard output")


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
    path = Path(target)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UsageError(f"--json: {target!r} cannot be written ({error.strerror}); give another file") from None
