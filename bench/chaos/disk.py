"""A disk that can be made full: a small file system in memory where the user may mount one, else a limit on files."""

import contextlib
import resource
import shutil
import subprocess
from pathlib import Path


class SmallDisk:
    """A folder of its own file system, `size` bytes large, or an ordinary folder where mounting is not allowed.

    Use as a context. `how` says which it is.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self._size = size
        self._mounted = False
        self._ballast = folder / "ballast"

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self.folder)]
        self._mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            subprocess.run(["umount", str(self.folder)], check=True)

    @property
    def how(self) -> str:
        """What a full disk is here."""
        return "a full tmpfs (ENOSPC)" if self._mounted else "a limit on the size of files (EFBIG)"

    def fill(self, pid: int | None, room: int) -> None:
        """Leave `room` bytes to the process `pid`: on the disk, or in each of its files (then None leaves all).

        What the process removes is room again, so call it until the process has ended.
        """
        if self._mounted:
            too_much = shutil.disk_usage(self.folder).free - room
            if too_much > 0:
                with contextlib.suppress(OSError), self._ballast.open("ab") as file:  # the process may be faster
                    file.write(b"\0" * too_much)
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, room))

    def clear(self) -> None:
        """Make room again; a limit goes with its process."""
        self._ballast.unlink(missing_ok=True)
