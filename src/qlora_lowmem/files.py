"""Files and folders that appear whole or not at all, where this package caches, and what is told of a full disk."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import platformdirs

from qlora_lowmem.errors import UsageError

Content = TypeVar("Content")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]  # of bytes or tokens in a file: no card and no run has more


def cache_folder() -> Path:
    """`$QLORA_LOWMEM_CACHE`, or `qlora_lowmem` under the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`).

    The virtual GPU, which knows nothing of this package, follows the same rule for its builds.
    """
    given = os.environ.get("QLORA_LOWMEM_CACHE")
    return Path(given) if given is not None else platformdirs.user_cache_path("qlora_lowmem", appauthor=False)


def write_whole(path: Path, content: str | bytes | Iterable[str], *, fsync: bool = False) -> None:
    """Put `content` in the place of a file, whole or not at all; where `path` is a link, of the file that it names.

    Args:
        content: lines may be made one at a time; where one fails to be made, nothing is written.
        fsync: whether it must survive a power cut from here on.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if isinstance(content, str | bytes):
            scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            with scratch.open("w", encoding="utf-8") as file:
                file.writelines(content)
        if fsync:
            flush(scratch)
        os.replace(scratch, target)  # noqa: PTH105 - the step that tests make fail
        if fsync:
            flush(target.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path, *, fsync: bool = False) -> Iterator[Path]:
    """A scratch folder that becomes `folder` where the block ends well, and is gone where it does not.

    Where another process has made `folder` meanwhile, that one stays. `OSError` if it cannot be made or renamed.
    """
    scratch = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)  # of an earlier process of that number
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if fsync:  # a power cut after the renaming must not leave half of it
            for path in (*scratch.rglob("*"), scratch):
                flush(path)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; `OSError` where the disk says that it is not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Around what writes `what` to `path`: a disk that is full or read-only is the user's to repair, a `UsageError`."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"run.output_dir: {what} cannot be written to {str(path)!r} ({error.strerror or error}). Make room on that "
            "disk or make it writable, then start the same command again; or give another folder with --output-dir"
        ) from error


def replace_text(path: Path, text: str, what: str) -> None:
    """Put `text`, which is `what` to a person, in the place of a file of the run; raises what `writing` does."""
    with writing(what, path):
        write_whole(path, text, fsync=True)


def as_dataclass(kind: type[Content], content: Mapping[str, Any]) -> Content:
    """What JSON says, as a dataclass.

    Raises:
        ValueError: fields that are missing or of another type, or, in `content` itself, unknown.
    """
    found = msgspec.convert(content, kind)
    unknown = content.keys() - msgspec.to_builtins(found).keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no field of {kind.__name__}")
    return found


def json_values(content: Any) -> Any:
    """`content` with null for every number that JSON cannot write (RFC 8259 has neither NaN nor infinities)."""
    if isinstance(content, dict):
        return {name: json_values(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_line(content: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(json_values(content), allow_nan=False) + "\n"
