"""A command's standard streams: always there, and what they do not take is no failure of the work."""

import errno
import io
import os
import sys
from typing import Any

from qlora_lowmem.errors import EXIT_USAGE


class _Forgiving(io.FileIO):
    """A stream whose writing does not fail; `error` is the first reason for which something was lost."""

    error: OSError | None = None

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = self.error or error
            return memoryview(content).nbytes


def make_sure() -> None:
    """Put streams of ours in the place of the process's own, unless somebody else's are there."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        from qlora_lowmem.virtual_gpu.streams import open_standard_streams

        open_standard_streams()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - for as long as we live
    for name, number in (("stdout", 1), ("stderr", 2)):
        now: Any = getattr(sys, name)
        if now is not getattr(sys, f"__{name}__"):
            continue
        buffer = io.BufferedWriter(_Forgiving(number, "w", closefd=False))
        errors, as_it_was = "backslashreplace" if number == 2 else "strict", {}
        if now is not None:
            errors = now.errors
            as_it_was = {"encoding": now.encoding, "line_buffering": now.line_buffering}
            as_it_was["write_through"] = now.write_through
        setattr(sys, name, io.TextIOWrapper(buffer, **{"encoding": "utf-8", "errors": errors, **as_it_was}))


def lost() -> OSError | None:
    """Why something on standard output was lost, `EPIPE` where its reader has gone; None if nothing was."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Forgiving) else None


def finish(code: int) -> int:
    """The exit code of a command that came to `code`, once all that it printed is written."""
    sys.stdout.flush()
    error = lost()
    if error is not None and error.errno != errno.EPIPE:  # who closes a pipe has read enough
        print(
            f"error: standard output cannot be written ({error.strerror}): what was to be there is lost",
            file=sys.stderr,
        )
        code = code or EXIT_USAGE
    sys.stderr.flush()
    return code
