"""Environments that differ from this one in a few packages, without installing torch again.

An overlay is a folder with one version of one package, without its dependencies; a process sees it before what is
installed by having it on PYTHONPATH. Overlays are kept and used again.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from qlora_lowmem.errors import UsageError

_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*([^\s;#]+)")


def read_constraints(path: Path) -> dict[str, str]:
    """Exact versions of a constraints file by normalised package name; comments, options and ranges are left out.

    Raises:
        UsageError: it cannot be read, or pins nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: the constraints cannot be read: {error.strerror}") from None
    pins = {}
    for line in lines:
        match = _PIN.match(line.strip())
        if match is not None:
            pins[normalised(match[1])] = match[2]
    if not pins:
        raise UsageError(f"{path}: no line of the form package==version; write the versions with pip freeze")
    return pins


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> str | None:
    """The version of a package in this environment; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def default_folder() -> Path:
    """Where overlays are kept: in the package's folder of the user's cache."""
    own = os.environ.get("QLORA_LOWMEM_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own or Path(shared) / "qlora_lowmem") / "overlays"


class Overlays:
    """Makes overlays under a folder.

    Args:
        folder: where they are kept, `NAME-VERSION` each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def environment(self, versions: Mapping[str, str]) -> dict[str, str]:
        """Environment variables in which Python sees these versions before what is installed.

        Raises:
            UsageError: pip cannot get one of them.
        """
        paths = [str(self._overlay(n, v)) for n, v in sorted(versions.items()) if installed(n) != v]
        before = os.environ.get("PYTHONPATH")
        return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}

    def _overlay(self, name: str, version: str) -> Path:
        target = self._folder / f"{name}-{version}"
        if target.is_dir():
            return target
        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self._folder))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch)]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UsageError(f"{name}=={version} cannot be installed: {last}")
        scratch.rename(target)
        return target
