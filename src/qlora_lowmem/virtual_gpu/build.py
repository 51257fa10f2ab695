"""Compiles the stub libraries on first use, and keeps them in a cache by what they were made from."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import discovery, stubs
from .cards import VirtualGPUUnavailable
from .discovery import CudaInstallation, CudaLibrary, functions_of, header_version

_SOURCES = Path(__file__).with_name("csrc")
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w")
# By library; `vgpu` is what the others share, and in it locks are taken in the reverse order (guard.h).
_SOURCES_OF = {
    "vgpu": (
        "account.cpp", "attributes.cpp", "errors.cpp", "identity.cpp", "written.cpp", "memory.cpp", "notices.cpp",
        "stubs.cpp", "thread_exit.cpp", "together.cpp",
    ),
    "driver": ("driver.cpp", "driver_memory.cpp"),
    "nvml": ("nvml.cpp",),
    "cudart": ("runtime_device.cpp", "runtime_launch.cpp", "runtime_memory.cpp", "runtime_stream.cpp"),
    "cublas": ("blas.cpp",),
    "cublasLt": ("blas.cpp",),
    "cudnn": ("dnn.cpp", "dnn_backend.cpp"),
    "cusparse": ("sparse.cpp",),
    "nccl": ("nccl.cpp",),
}  # fmt: skip
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
    asked = [str(_SOURCES), str(torch[0]), str(shutil.which(compiler[0])), *compiler]
    asked += [os.environ.get(name, "") for name in discovery.VARIABLES]
    for root in _cache_roots():
        if (build := _recall(root, asked)) is not None:
            return build
    cuda = discovery.find_cuda(frozenset(stubs.policies()))
    files = [*_own_files(), Path(discovery.__file__), *torch, *(library.path for library in cuda.libraries)]
    files += [*(cuda.headers / name for name in discovery.HEADERS), Path(asked[2])]
    key = _key(cuda, compiler)
    failures: list[str] = []
    for root in _cache_roots():
        folder = root / key
        if re.search(r"[\s:]", str(folder)):
            raise VirtualGPUUnavailable(
                f"the virtual GPU's libraries lie in {folder}, and a preloaded library's path must not hold spaces or "
                f"colons. Set {CACHE_VARIABLE} to a folder without them."
            )
        try:
            build = _load(folder) or _build_once(folder, cuda, compiler)
        except OSError as error:
            failures.append(f"{root} ({error.strerror or error})")
            continue
        _remember(root, asked, key, files)
        return build
    raise VirtualGPUUnavailable(
        f"the virtual GPU's libraries cannot be written to any of {', '.join(failures)}. "
        f"Set {CACHE_VARIABLE} to a folder that can be written."
    )


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
    return sorted([_SOURCES, *_SOURCES.rglob("*"), Path(__file__), Path(stubs.__file__), stubs.TABLES])


def _key(cuda: CudaInstallation, compiler: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in _own_files():
        if source.is_file():
            digest.update(source.name.encode() + source.read_bytes())
    stamps = [f"{library.path} {_stamp(library.path)}" for library in cuda.libraries]
    digest.update(json.dumps([_compiler_version(compiler), header_version(cuda.headers), *stamps]).encode())
    return digest.hexdigest()[:20]


def _compiler_version(compiler: Sequence[str]) -> str:
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return f"{' '.join(compiler)}: {answer.stdout.splitlines()[0] if answer.stdout else 'unknown'}"


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
    """The build in a folder, if every file is as long as it was: the loader only warns of one that was cut short."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in record.get("files", {}).items()):
            return Build(folder, tuple(folder / name for name in record["preload"]), record["versions"])
    return None


def _build_once(folder: Path, cuda: CudaInstallation, compiler: tuple[str, ...]) -> Build:
    """Makes the build, or waits for the process that does; OSError where it cannot be written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (made := _load(folder)) is not None:
            return made
        shutil.rmtree(folder, ignore_errors=True)
        print("virtual GPU: compiling its libraries (once)", file=sys.stderr)
        # It appears under its name when it is complete, so that one that was interrupted is never used.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
            work = Path(scratch) / "build"
            work.mkdir()
            _Builder(work, cuda, compiler).build()
            work.rename(folder)
    if (made := _load(folder)) is None:
        raise OSError(f"what was written to {folder} is not there")
    return made


class _Builder:
    def __init__(self, folder: Path, cuda: CudaInstallation, compiler: tuple[str, ...]) -> None:
        self.folder = folder
        self.cuda = cuda
        self.compiler = compiler
        self.cudart = header_version(cuda.headers)
        self.versions = {"cublasLt": self.cudart * 10} | _library_versions(cuda.libraries)

    def build(self) -> None:
        libraries = {library.stem: library for library in self.cuda.libraries}
        objects: dict[str, list[Path]] = {stem: [] for stem in ("vgpu", "driver", "nvml", *libraries)}
        jobs = [(stem, source) for stem in objects for source in _SOURCES_OF.get(stem, ())]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for (stem, _), compiled in zip(jobs, pool.map(lambda job: self._compile(*job), jobs), strict=True):
                objects[stem].append(compiled)
        self._link("libvgpu.so", objects["vgpu"], None)
        self._link_driver(objects["driver"])
        self._link("libnvidia-ml.so.1", objects["nvml"], _defined_functions(objects["nvml"]))
        for stem, library in libraries.items():
            self._link_library(library, objects[stem])
        preload = ["libvgpu.so", "libcuda.so.1", "libnvidia-ml.so.1", *map(_file_name, libraries.values())]
        versions = {"cuda": str(self.cudart), "compiler": _compiler_version(self.compiler)}
        versions |= {stem: str(version) for stem, version in self.versions.items()}
        for leftover in (*self.folder.glob("*.o"), *self.folder.glob("*.S"), *self.folder.glob("*.map")):
            leftover.unlink()
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        record = {"preload": preload, "versions": versions, "files": files}
        (self.folder / "build.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _compile(self, stem: str, source: str) -> Path:
        target = self.folder / f"{stem}-{source}.o"
        defines = [f"-DVGPU_CUDART_VERSION={self.cudart}", f"-DVGPU_CUBLAS_VERSION={self.versions['cublasLt']}"]
        defines += [f"-DVGPU_LIBRARY_{stem}", f"-DVGPU_LIBRARY_VERSION={self.versions.get(stem, 0)}"]
        headers = ["-I", str(self.cuda.headers), "-idirafter", str(_SOURCES)]
        self._run([*_FLAGS, *defines, *headers, "-c", str(_SOURCES / source), "-o", str(target)])
        return target

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def _link_library(self, library: CudaLibrary, objects: list[Path]) -> None:
        exports = functions_of(library.path)
        if not exports:
            raise VirtualGPUUnavailable(f"{library.path} exports nothing; reinstall PyTorch with its dependencies")
        policy, version = stubs.policies()[library.stem], self.versions.get(library.stem, 0)
        text = stubs.write_assembly(policy, exports, _defined_functions(objects), version)
        inputs = [*objects, self._write(f"{library.stem}-stubs.S", text)]
        self._link(_file_name(library), inputs, exports, discovery.version_node(library.path), library.soname)

    def _link_driver(self, objects: list[Path]) -> None:
        header = (self.cuda.headers / "cuda.h").read_text(encoding="utf-8", errors="replace")
        functions, aliases = stubs.driver_functions(header)
        implemented = _defined_functions(objects)
        text = stubs.write_assembly(stubs.policies()["driver"], functions, implemented, 0)
        text += stubs.write_aliases(aliases)
        self._link("libcuda.so.1", [*objects, self._write("driver-stubs.S", text)], {*functions, *implemented})

    def _link(self, name: str, inputs: list[Path], exported: set[str] | None, node: str = "", soname: str = "") -> None:
        options = ["-shared", "-fPIC", f"-Wl,-soname,{soname or name}", "-Wl,-z,now", "-o", str(self.folder / name)]
        if exported is not None:
            script = self._write(f"{name}.map", stubs.write_version_script(node, exported))
            options += [f"-Wl,--version-script={script}", "-Wl,-rpath,$ORIGIN", str(self.folder / "libvgpu.so")]
            if name.startswith("libcudart"):
                options.append(str(self.folder / "libcuda.so.1"))
        # The C++ runtime is linked in, so that a preloaded library does not decide which one the program gets; where
        # the static one is not installed, the shared one must do.
        arguments = [*map(str, inputs), *options, "-lpthread", "-ldl"]
        try:
            self._run([*arguments, "-static-libstdc++", "-static-libgcc"])
        except VirtualGPUUnavailable:
            self._run(arguments)

    def _run(self, arguments: list[str]) -> None:
        answer = subprocess.run([*self.compiler, *arguments], capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            last = "\n".join(answer.stderr.splitlines()[:8])
            raise VirtualGPUUnavailable(
                f"{self.compiler[0]} could not compile the virtual GPU's libraries against {self.cuda.headers}:\n"
                f"{last}\nName another compiler with CXX, or report this with the lines above."
            )


def _file_name(library: CudaLibrary) -> str:
    """`libcudart-virtual.so.13`, loaded under the name `libcudart.so.13`.

    PyTorch opens all real libraries by path as soon as it finds a file called `libcudart.so` in its address space: they
    would never be called, but loading them takes a second.
    """
    return library.soname.replace(".so", "-virtual.so")


def _defined_functions(objects: Sequence[Path]) -> set[str]:
    return {name for path in objects for name in functions_of(path, ".symtab")}


_ASK_VERSIONS = """
import ctypes, json, sys
answers = {}
for stem, path, function, returned in json.loads(sys.argv[1]):
    try:
        ask = getattr(ctypes.CDLL(path, ctypes.RTLD_GLOBAL), function)
        ask.restype = ctypes.c_size_t if returned else ctypes.c_int
        value = ctypes.c_int()
        answers[stem] = ask() if returned else (ask(ctypes.byref(value)), value.value)[1]
    except (OSError, AttributeError):
        pass
print(json.dumps(answers))
"""


def _library_versions(libraries: Sequence[CudaLibrary]) -> dict[str, int]:
    """What the real libraries say their versions are, asked in a process of its own; none of these needs a GPU."""
    questions = [
        (library.stem, str(library.path), policy.version, not policy.version_written)
        for library in libraries
        if (policy := stubs.policies()[library.stem]).version is not None
    ]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-I", "-c", _ASK_VERSIONS, json.dumps(questions)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return dict(json.loads(answer.stdout)) if answer.returncode == 0 else {}
