"""Files: small ones are read here, with limits; files and folders appear whole or not at all; where this package
caches; what is told of a full disk."""

import codecs
import errno
import json
import math
import os
import select
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import platformdirs

from qlora_lowmem.errors import UsageError
from qlora_lowmem.owned import NotOwnError, flush, own_folder
from qlora_lowmem.units import MIB, format_bytes

SMALL_FILE = 64 * MIB  # more than any recipe, configuration, index of weights or table of results here
_PATIENCE = 10.0  # seconds without a byte from a pipe
_NOT_UTF8 = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

Content = TypeVar("Content")
_SHORT = 50  # characters of a name, so that one of full length (255 bytes) has a scratch file beside it
Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]  # of bytes or tokens in a file: no card and no run has more


def cache_folder(kind: str) -> Path:
    """`kind` in `$QLORA_LOWMEM_CACHE`, or in `qlora_lowmem` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`).

    It is made where it can be. The virtual GPU, which knows nothing of this module, follows the same rule.

    Raises:
        UsageError: others could have written what lies there, or this user has no home.
    """
    given = os.environ.get("QLORA_LOWMEM_CACHE")
    try:
        root = Path(given) if given is not None else platformdirs.user_cache_path("qlora_lowmem", appauthor=False)
    except RuntimeError:  # neither HOME nor an entry of the user
        raise UsageError(
            "HOME is not set and this user has no home: set QLORA_LOWMEM_CACHE to a folder for what is kept"
        ) from None
    try:
        return own_folder(root / kind)
    except NotOwnError as error:
        raise UsageError(f"cache: {error}; or set QLORA_LOWMEM_CACHE to a folder of your own") from None
    except OSError:
        return root / kind  # who writes there says that it cannot be


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a person gave it, `~` replaced; as it stands, and so not there, where that user has no home."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises a RuntimeError then


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is there. No, of what cannot be looked at: a name too long, a folder that is shut."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's own raises of those


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is there; as `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def read_small(path: str | os.PathLike[str], limit: int = SMALL_FILE) -> bytes:
    """The content of a file that is held whole in memory.

    A pipe (a shell's `<(...)`) is read to its end; one into which nobody writes for ten seconds is none.

    Args:
        limit: in bytes.

    Raises:
        OSError: it cannot be read; `strerror` is what to tell: no such file, a folder, a device or socket, a pipe that
            nobody writes into, more than the limit.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError as error:  # NUL in a name
        raise OSError(errno.EINVAL, str(error), path) from None
    try:
        found = os.fstat(handle)
        regular = stat.S_ISREG(found.st_mode)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, "it is a folder", path)
        if not (regular or stat.S_ISFIFO(found.st_mode)):
            raise OSError(errno.EINVAL, "it is a device or a socket, no file", path)
        content = b""
        if found.st_size <= limit:
            with os.fdopen(handle, "rb", closefd=False) as file:
                content = file.read(limit + 1) if regular else _piped(handle, limit, path)
        if max(found.st_size, len(content)) > limit:
            raise OSError(errno.EFBIG, f"it has more than {format_bytes(limit)}", path)
    finally:
        os.close(handle)
    return content


def _piped(handle: int, limit: int, path: str | os.PathLike[str]) -> bytes:
    """What comes through a pipe until its end, or one byte more than the limit."""
    parts: list[bytes] = []
    until = time.monotonic() + _PATIENCE
    while sum(map(len, parts)) <= limit:
        ready, _, _ = select.select([handle], [], [], max(0.0, until - time.monotonic()))
        try:
            part = os.read(handle, MIB) if ready else None
        except BlockingIOError:  # another reader was faster
            part = None
        if part:
            parts.append(part)
            until = time.monotonic() + _PATIENCE
        elif part == b"" and parts:
            break
        elif time.monotonic() >= until:
            raise OSError(errno.ETIMEDOUT, f"it is a pipe, and nobody wrote for {_PATIENCE:.0f} seconds", path)
        else:
            time.sleep(0.05)  # the end of a pipe that nobody has opened yet
    return b"".join(parts)


def read_text(path: str | os.PathLike[str], limit: int = SMALL_FILE) -> str:
    """The text of a small file in UTF-8, without a byte order mark; raises `OSError` as `read_small`, and where it is
    none."""
    raw = read_small(path, limit)
    other = next((name for mark, name in _NOT_UTF8.items() if raw.startswith(mark)), None)
    if other is not None:
        raise OSError(errno.EILSEQ, f"it is {other}; save the file as UTF-8", path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw[: fault.start].count(b"\n") + 1
        why = f"line {line}: byte {raw[fault.start]:#04x} is not UTF-8; save the file as UTF-8"
        raise OSError(errno.EILSEQ, why, path) from None


def read_json(path: str | os.PathLike[str], limit: int = SMALL_FILE) -> Any:
    """The value in a small JSON file; raises `OSError` as `read_text`, and where it is no JSON."""
    try:
        return json.loads(read_text(path, limit))
    except RecursionError:
        raise OSError(errno.EINVAL, "it is no JSON that can be read: nested too deeply", path) from None
    except ValueError as fault:  # also a number of more digits than Python reads
        raise OSError(errno.EINVAL, f"it is no JSON: {fault}", path) from None


def write_whole(path: Path, content: str | bytes | Iterable[str], *, fsync: bool = False) -> None:
    """Put `content` in the place of a file, whole or not at all; where `path` is a link, of the file that it names.

    Args:
        content: lines may be made one at a time; where one fails to be made, nothing is written.
        fsync: whether it must survive a power cut from here on.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name[:_SHORT]}.{os.getpid()}")
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
