"""A folder's manifest: size and SHA-256 of each of its files, written last and flushed to the disk.

A folder that has one is whole; one that differs from it was torn or damaged after it was written.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_lowmem.files import flush, write_whole

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Flush every file in `folder` to the disk, then write and flush its manifest.

    Raises:
        OSError: something cannot be read, written or flushed.
    """
    files = {}
    for path in _files(folder):
        flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    write_whole(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n", fsync=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None if it is as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = content["files"]
        for name, written in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes, and {written['bytes']:,} were written"
            if _digest(path) != written["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never finished"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read as one"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
