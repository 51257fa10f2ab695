"""Environments that differ from this one in a few packages, without installing torch again.

An overlay is a folder with one version of one package, and of its dependencies those alone that are not installed
in a version that it accepts; a process sees it before what is installed by having it on PYTHONPATH. Overlays are kept
and used again.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import whole_folder

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
        folder: where they are kept, `NAME-VERSION/site-packages` each.
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
        # `site-packages`, so that lines of code are named as those of installed packages are (`kinds.line_of`).
        target = self._folder / f"{name}-{version}" / "site-packages"
        if target.is_dir():
            return target
        with whole_folder(target) as scratch:
            wanted = [f"{name}=={version}"]
            while wanted:
                _install(scratch, wanted)
                wanted = _absent(scratch)
        return target


def _install(target: Path, requirements: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise UsageError(f"{', '.join(requirements)} cannot be installed: {errors[-1]}")


def _absent(target: Path) -> list[str]:
    """Requirements of what is in `target` that are neither there nor installed in a version that they accept."""
    inside = list(metadata.distributions(path=[str(target)]))
    there = {normalised(found.name) for found in inside}
    needed = [Requirement(text) for found in inside for text in found.requires or ()]
    applies = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    absent = {
        normalised(need.name): f"{need.name}{need.specifier}"
        for need in applies
        if normalised(need.name) not in there and not _meets(installed(need.name), need)
    }
    return sorted(absent.values())


def _meets(version: str | None, requirement: Requirement) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)
