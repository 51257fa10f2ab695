"""Folders that nobody but this user can have written to: what lies in a cache is loaded and believed."""

import contextlib
import os
import stat
from pathlib import Path

_UNKNOWN_OWNER = 65534  # of what lies outside a container that was started without privileges


class NotOwnError(PermissionError):
    """A folder that somebody else may have written to; the message says why and what to do."""

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(f"{folder} cannot be trusted: {why}")


def own_folder(folder: Path) -> Path:
    """Make a folder for this user alone, or check the one that is there; returns its absolute path.

    It is a real folder, this user's, and nobody else may write there. On the way to it, folders and links are this
    user's or root's, and nobody else may put another in their place.

    Raises:
        NotOwnError: it is not so.
        OSError: it cannot be made.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - links stay
    for part in reversed((folder, *folder.parents)):
        if not os.path.lexists(part):
            with contextlib.suppress(FileExistsError):  # another process was faster
                part.mkdir(0o700)
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise NotOwnError(folder, "it is a link or a file. Remove it")
    real = Path(os.path.realpath(folder))
    for part in dict.fromkeys((folder, *folder.parents, real, *real.parents)):
        _check(part, last=part in (folder, real))
    return folder


def _check(part: Path, *, last: bool) -> None:
    status = part.lstat()
    trusted = {os.getuid()} if last else {os.getuid(), 0, _UNKNOWN_OWNER}
    if status.st_uid not in trusted:
        raise NotOwnError(part, f"it belongs to user {status.st_uid}, and this is user {os.getuid()}")
    mode = status.st_mode
    if stat.S_ISLNK(mode):
        return
    if (mode & stat.S_IWOTH and not (mode & stat.S_ISVTX and not last)) or (last and mode & stat.S_IWGRP):
        raise NotOwnError(part, f"others may write there (mode {stat.S_IMODE(mode):o}). chmod go-w {part}")


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; `OSError` where the disk says that it is not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
