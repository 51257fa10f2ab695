"""What SIGINT, SIGTERM and SIGHUP do to a command: end it at once while there is nothing to undo, else unwind it.

A signal that raises is lost where it comes in the midst of an import (some libraries catch everything), and is a
traceback where it comes before or after all that would catch it. Signals that are ignored, as SIGINT is in the
background of a shell and SIGHUP under `nohup`, and those that somebody else handles, stay as they are.

A command imports this first, so it imports nothing itself: `signal` alone takes as long as the rest of what Python does
until then, in which an interrupt is a traceback of its own.
"""

import _signal  # type: ignore[import-not-found]  # which `signal` wraps
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_AT_FIRST = {
    _signal.SIGINT: (_signal.default_int_handler, _signal.SIG_DFL),  # Python's; the package's while it imports this
    _signal.SIGTERM: (_signal.SIG_DFL,),
    _signal.SIGHUP: (_signal.SIG_DFL,),
}
_AGAIN_SECONDS = 0.05


def take() -> None:
    """From here on, the signals end the process at once."""
    _handle(_end)


def let_go() -> None:
    """From here on, the signals do what the system does without a handler, which interrupts nothing half way."""
    _handle(_signal.SIG_DFL)


class importing:
    """While modules are imported, the signals end the process at once: there is nothing to undo."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._before = _handle(_end)

    def __exit__(self, *_: object) -> None:
        _put_back(self._before)


class unwinding:
    """While a command does its work: SIGINT raises `KeyboardInterrupt`, the others `SystemExit` with their exit code.

    So temporary folders go and other processes end. What is raised where Python can only ignore it (as an object is
    taken apart) comes once more.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> None:
        self._before, sys.unraisablehook = _handle(_unwind), self._ignored

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        _put_back(self._before)

    def _ignored(self, what: "Any") -> None:
        number = _SIGNALS.get(repr(what.exc_value))
        if number is None:
            self._hook(what)
            return
        import threading

        timer = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def _handle(handler: "Any") -> "dict[int, Any]":
    """Put `handler` in the place of Python's own, or of another of ours; returns what was there."""
    before = {}
    for number, at_first in _AT_FIRST.items():
        now = _signal.getsignal(number)
        if now in (*at_first, _end, _unwind):
            try:
                _signal.signal(number, handler)
            except ValueError:  # in another thread than the first, which takes no signals
                return {}
            before[number] = now
    return before


def _put_back(before: "dict[int, Any]") -> None:
    for number, handler in before.items():
        _signal.signal(number, handler)


def _end(number: int, _frame: object) -> "NoReturn":
    try:
        os.write(2, b"interrupted\n" if number == _signal.SIGINT else b"")
    finally:
        os._exit(128 + number)


def _raised_for(number: int) -> BaseException:
    return KeyboardInterrupt() if number == _signal.SIGINT else SystemExit(128 + number)


def _unwind(number: int, _frame: object) -> "NoReturn":
    raise _raised_for(number)


_SIGNALS = {repr(_raised_for(number)): number for number in _AT_FIRST}
