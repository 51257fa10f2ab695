"""Temporary folders, of which none stays for long, however the process that made it ends."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "qlora_lowmem.scratch-"
_JUST_MADE_SECONDS = 60.0  # in which a folder may not have its lock yet


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder for the block. Those that a process left behind because it was killed are removed on the way.

    Whose process lives is told by a lock on the folder, which it and what it has forked hold.
    """
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            if left.lstat().st_uid == os.getuid() and time.time() - left.lstat().st_mtime > _JUST_MADE_SECONDS:
                with _locked(left):
                    shutil.rmtree(left)
    # What cannot be removed now, as a process that is being killed still writes there, the next one removes.
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder, _locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
