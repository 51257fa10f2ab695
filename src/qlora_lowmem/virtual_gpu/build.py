"""Compiles the stub libraries on first use, and keeps them in a cache by what they were made from."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_lowmem.owned import NotOwnError, flush, own_folder

from . import compiling, discovery, stubs
from .cards import VirtualGPUUnavailable
from .compiling import SOURCES, Builder, compiler_version, hash_of
from .discovery import CudaInstallation, header_version

_COMPILERS = ("g++", "c++", "clang++")
CACHE_VARIABLE = "QLORA_LOWMEM_CACHE"


@dataclass(frozen=True)
class Build:
    """The compiled stubs.

    Attributes:
        folder: where they lie.
        preload: the libraries in the order that they are preloaded.
        versions: what they were built for: `cuda`, `compiler`, and the libraries' own versions.
    """

    folder: Path
    preload: tuple[Path, ...]
    versions: dict[str, str]


def ensure_built() -> Build:
    """The stubs for this Python environment, compiled if the cache does not have them.

    Raises:
        VirtualGPUUnavailable: there is no compiler, no CUDA build of PyTorch, no headers, or the cache and the
            temporary folder cannot be written; the message says what to do.
    """
    torch = discovery.find_torch()
    compiler = find_compiler()
    asked = [str(SOURCES), str(torch[0]), str(shutil.which(compiler[0])), *compiler]
    asked += [os.environ.get(name, "") for name in discovery.VARIABLES]
    failures: list[str] = []
    for root in _cache_roots():
        if re.search(r"[\s:]", str(root)):
            raise VirtualGPUUnavailable(
                f"the virtual GPU's libraries lie in {root}, and a preloaded library's path must not hold spaces or "
                f"colons. Set {CACHE_VARIABLE} to a folder without them."
            )
        try:
            _check_usable(root)
            build = _recall(root, asked) or _find_or_build(root, asked, torch, compiler)
        except OSError as error:
            failures.append(f"{root} ({error if isinstance(error, NotOwnError) else error.strerror or error})")
            continue
        if failures:
            print(f"virtual GPU: its libraries are in {build.folder}, not in {failures[0]}", file=sys.stderr)
        return build
    raise VirtualGPUUnavailable(
        f"the virtual GPU's libraries cannot be kept in any of {', '.join(failures)}. "
        f"Set {CACHE_VARIABLE} to a folder of your own that can be written, on a disk with room."
    )


def _check_usable(root: Path) -> None:
    own_folder(root)
    if os.statvfs(root).f_flag & os.ST_NOEXEC:  # the loader would warn, and start programs without the libraries
        raise OSError(errno.EACCES, "nothing may be executed from that disk: it is mounted noexec")


def _find_or_build(root: Path, asked: list[str], torch: list[Path], compiler: tuple[str, ...]) -> Build:
    """The build below a folder of the cache, made if need be; OSError where it cannot be written."""
    cuda = discovery.find_cuda(frozenset(stubs.policies()))
    files = [*_own_files(), Path(discovery.__file__), *torch, *(library.path for library in cuda.libraries)]
    files += [*(cuda.headers / name for name in discovery.HEADERS), Path(asked[2])]
    key = _key(cuda, compiler)
    build = _load(root / key) or _build_once(root / key, cuda, compiler)
    _remember(root, asked, key, files)
    return build


def _cache_roots() -> list[Path]:
    """Where builds are kept; the last is for this user alone and goes with the machine's temporary files."""
    named = os.environ.get(CACHE_VARIABLE)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - stays without a home
    home = Path(named) if named else Path(caches) / "qlora_lowmem"
    own = [home / "virtual_gpu"] if home.parts[:1] != ("~",) else []
    return [*own, _temporary_folder() / "virtual_gpu"]


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"qlora_lowmem-{os.getuid()}"


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, g++, c++, clang++, or the one in the package `ziglang`.

    Raises:
        VirtualGPUUnavailable: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else _COMPILERS:
        if name and shutil.which(name.split()[0]):
            return tuple(name.split())
    if chosen:
        raise VirtualGPUUnavailable(f"CXX is {chosen!r}, which is not a command here. Unset it, or name a compiler.")
    if find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    raise VirtualGPUUnavailable(
        "no C++ compiler (g++, c++ or clang++) is installed, and the virtual GPU's libraries are compiled on first "
        "use. Install one, or the one from PyPI: python -m pip install ziglang"
    )


def _own_files() -> list[Path]:
    modules = (__file__, compiling.__file__, stubs.__file__)
    return sorted([SOURCES, *SOURCES.rglob("*"), *map(Path, modules), stubs.TABLES])


def _key(cuda: CudaInstallation, compiler: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in _own_files():
        if source.is_file():
            digest.update(source.name.encode() + source.read_bytes())
    stamps = [f"{library.path} {_stamp(library.path)}" for library in cuda.libraries]
    digest.update(json.dumps([compiler_version(compiler), header_version(cuda.headers), *stamps]).encode())
    return digest.hexdigest()[:20]


def _stamp(path: Path) -> list[int]:
    """What tells, without reading a file, that it is the one it was: its size and time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


# Finding out what a build is made from takes longer than anything else at the start of a run. So the answer is kept,
# with the sizes and times of all files that led to it.
def _answer_file(root: Path, asked: list[str]) -> Path:
    return root / f"found-{zlib.crc32(json.dumps(asked).encode()):08x}.json"


def _recall(root: Path, asked: list[str]) -> Build | None:
    """The build that was found when the same was asked, unless a file has changed since."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        answer = json.loads(_answer_file(root, asked).read_text(encoding="utf-8"))
        unchanged = all(_stamp(Path(path)) == stamp for path, stamp in answer["files"].items())
        if answer["asked"] == asked and unchanged:
            return _load(root / answer["key"])
    return None


def _remember(root: Path, asked: list[str], key: str, files: list[Path]) -> None:
    answer = {"asked": asked, "key": key, "files": {str(path): _stamp(path) for path in files}}
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=root, prefix=".found-") as scratch:
        (Path(scratch) / "answer").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        (Path(scratch) / "answer").replace(_answer_file(root, asked))


def _load(folder: Path) -> Build | None:
    """The build in a folder, if every file is what it was: the loader only warns of one that is damaged, or crashes."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        if all(hash_of(folder / name) == known for name, known in record.get("files", {}).items()):
            return Build(folder, tuple(folder / name for name in record["preload"]), record["versions"])
    return None


def _build_once(folder: Path, cuda: CudaInstallation, compiler: tuple[str, ...]) -> Build:
    """Makes the build, or waits for the process that does; OSError where it cannot be written."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (made := _load(folder)) is not None:
            return made
        shutil.rmtree(folder, ignore_errors=True)
        _sweep(folder.parent)
        print("virtual GPU: compiling its libraries (once)", file=sys.stderr)
        # It appears under its name when it is complete and on the disk, so that one that was interrupted is never used.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".build-{folder.name}-") as scratch:
            work = Path(scratch) / "build"
            work.mkdir()
            Builder(work, cuda, compiler).build()
            for path in (*work.iterdir(), work):
                flush(path)
            work.rename(folder)
            flush(folder.parent)
    if (made := _load(folder)) is None:
        raise OSError(f"what was written to {folder} is not there")
    return made


def _sweep(root: Path) -> None:
    """Removes what builds left that were killed: those that no process holds the lock of."""
    for leftover in root.glob(".build-*"):
        key = leftover.name.split("-")[1]
        with contextlib.suppress(OSError), (root / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
