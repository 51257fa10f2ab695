"""Where output is to go: tried whole before there is work for it, written whole after it.

A disk may fill meanwhile, so what is text goes to standard output where its file cannot be written any more.
"""

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import write_whole

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = bytes(2**16)  # a disk that is full takes a new file, and nothing into it


def check_file(flag: str, target: str | None, *, coming: Path | None = None) -> None:
    """Make sure that a file can be written to `target`; None is no file.

    Args:
        coming: a folder that the command will make; what is to be in it can be told only then.

    Raises:
        UsageError: nothing can be written there.
    """
    if target is None:
        return
    with writing(flag, target):
        if not target.strip():
            raise FileNotFoundError(errno.ENOENT, "it is empty")
        path = Path(os.path.realpath(target))
        if target.endswith("/") or path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if coming is not None and not path.parent.exists() and path.parent == Path(os.path.realpath(coming)):
            return
        if _is_special(Path(target)):  # of /dev/fd/3, the real path may name a pipe that is nowhere
            _try_special(Path(target))
        elif not path.parent.exists():
            raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it")
        else:
            _try_folder(path.parent)


def check_folder(flag: str, target: str | None) -> None:
    """Make sure that files can be written into a folder, which is made later if it is not there; None is no folder.

    Raises:
        UsageError: nothing can be written there.
    """
    if target is None:
        return
    with writing(flag, target, "folder"):
        if not target.strip():
            raise FileNotFoundError(errno.ENOENT, "it is empty")
        path = Path(os.path.realpath(target))
        there = next(each for each in (path, *path.parents) if each.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file" if there == path else f"{str(there)!r} is a file")
        _try_folder(there)


def check_new_folder(flag: str, target: str) -> Path:
    """The new folder of a command, made sure of before there is work to lose: `UsageError` if it cannot be made."""
    check_folder(flag, target)
    path = Path(os.path.realpath(target))
    if path.exists() and (path == Path.cwd() or any(path.iterdir())):
        raise UsageError(f"{flag}: {target!r} exists already; give a new folder")
    return Path(target)


def write(flag: str, target: str | None, content: str | bytes) -> None:
    """Write a file whole or not at all, text then to standard output; None is no file.

    Raises:
        UsageError: it cannot be written (any more).
    """
    if target is None:
        return
    with writing(flag, target, instead=content if isinstance(content, str) else ""):
        path = Path(target)
        if _is_special(path):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            write_whole(path, content)


def write_each(*writers: Callable[[], object]) -> None:
    """Call them all; what could not be written is told together, once the others are.

    Raises:
        UsageError: of one or more.
    """
    faults = []
    for writer in writers:
        try:
            writer()
        except UsageError as fault:
            faults.append(str(fault))
    if faults:
        raise UsageError("\n".join(faults))


@contextmanager
def writing(flag: str, target: str, kind: str = "file", *, instead: str = "") -> Iterator[None]:
    """Around what writes to `target`: a `UsageError` for an `OSError`, with `instead` on standard output."""
    try:
        yield
    except OSError as error:
        sys.stdout.write(instead)
        where = "; what was to be in it is on standard output" if instead else ""
        room = "make room on that disk, or " if error.errno in _NO_ROOM else ""
        raise UsageError(
            f"{flag}: {target!r} cannot be written ({error.strerror or error}){where}; {room}give another {kind}"
        ) from None


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, which is written into and not replaced."""
    return path.exists() and not path.is_file()


def _try_special(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISCHR(mode):
        with path.open("wb", buffering=0) as device:
            device.write(b"")  # /dev/full refuses even that
    elif not stat.S_ISFIFO(mode):
        raise OSError(errno.EINVAL, "it is no file")
    elif not os.access(path, os.W_OK):  # to open it would wait for a reader
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _try_folder(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # without a name, which an interrupt could leave
        left = len(_ROOM)
        while left:
            left -= file.write(_ROOM[:left])
