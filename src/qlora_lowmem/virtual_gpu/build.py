"""Compiles the stub libraries on first use, and keeps them in a cache by what they were made from."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from . import stubs
from .discovery import CudaInstallation, CudaLibrary, find_cuda, header_version, read_exports
from .errors import VirtualGPUUnavailable

_SOURCES = Path(__file__).with_name("csrc")
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w")
_LIBRARY_SOURCES = {
    "cudart": ("runtime_device.cpp", "runtime_launch.cpp", "runtime_memory.cpp", "runtime_stream.cpp"),
    "cublas": ("blas.cpp",),
    "cublasLt": ("blas.cpp",),
    "cudnn": ("dnn.cpp", "dnn_backend.cpp"),
    "cusparse": ("sparse.cpp",),
    "nccl": ("nccl.cpp",),
}
# Locks are taken in the reverse order (guard.h).
_SHARED = (
    "account.cpp", "attributes.cpp", "errors.cpp", "exchanged.cpp", "memory.cpp", "notices.cpp", "stubs.cpp",
    "thread_exit.cpp",
)  # fmt: skip
_DRIVER = ("driver.cpp", "driver_memory.cpp")
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
    cuda = find_cuda(frozenset(stubs.POLICIES))
    compiler = find_compiler()
    key = _key(cuda, compiler)
    failures: list[str] = []
    for root in _cache_roots():
        folder = root / key
        _require_preloadable(folder)
        if _is_whole(folder):
            return _load(folder)
        try:
            with _locked(root, key):
                if not _is_whole(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                    _build_into(folder, cuda, compiler)
        except OSError as error:
            failures.append(f"{root} ({error.strerror or error})")
            continue
        return _load(folder)
    raise VirtualGPUUnavailable(
        f"the virtual GPU's libraries cannot be written to any of {', '.join(failures)}. "
        f"Set {CACHE_VARIABLE} to a folder that can be written."
    )


def _cache_roots() -> list[Path]:
    """Where builds are kept; the last is for this user alone and goes with the machine's temporary files."""
    named = os.environ.get(CACHE_VARIABLE)
    home = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_lowmem"
    return [home / "virtual_gpu", _temporary_folder() / "virtual_gpu"]


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


def _key(cuda: CudaInstallation, compiler: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*_SOURCES.rglob("*"), Path(__file__), Path(stubs.__file__)]):
        if source.is_file():
            digest.update(source.name.encode() + source.read_bytes())
    digest.update(_compiler_version(compiler).encode())
    digest.update(str(header_version(cuda.headers)).encode())
    for library in cuda.libraries:
        status = library.path.stat()
        digest.update(f"{library.path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:20]


def _compiler_version(compiler: Sequence[str]) -> str:
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return f"{' '.join(compiler)}: {answer.stdout.splitlines()[0] if answer.stdout else 'unknown'}"


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_preloadable(folder: Path) -> None:
    if re.search(r"[\s:]", str(folder)):
        raise VirtualGPUUnavailable(
            f"the virtual GPU's libraries lie in {folder}, and a preloaded library's path must not hold spaces or "
            f"colons. Set {CACHE_VARIABLE} to a folder without them."
        )


def _is_whole(folder: Path) -> bool:
    """Whether a build is there with every file as long as it was: the loader only warns of a damaged one."""
    try:
        files = json.loads((folder / "build.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _load(folder: Path) -> Build:
    record = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    return Build(folder, tuple(folder / name for name in record["preload"]), record["versions"])


def _build_into(folder: Path, cuda: CudaInstallation, compiler: tuple[str, ...]) -> None:
    print("virtual GPU: compiling its libraries (once)", file=sys.stderr)
    # A build appears under its name when it is whole, so that one that was interrupted is never used.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".build-") as scratch:
        work = Path(scratch) / "build"
        work.mkdir()
        _Builder(work, cuda, compiler).build()
        work.rename(folder)


class _Builder:
    def __init__(self, folder: Path, cuda: CudaInstallation, compiler: tuple[str, ...]) -> None:
        self.folder = folder
        self.cuda = cuda
        self.compiler = compiler
        cudart = header_version(cuda.headers)
        self.versions = {"cublasLt": cudart * 10} | _library_versions(cuda.libraries)

    def build(self) -> None:
        libraries = {library.stem: library for library in self.cuda.libraries}
        jobs: list[tuple[str, str | None]] = [(source, None) for source in (*_SHARED, *_DRIVER, "nvml.cpp")]
        jobs += [(source, stem) for stem in libraries for source in _LIBRARY_SOURCES.get(stem, ())]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = dict(zip(jobs, pool.map(lambda job: self._compile(*job), jobs), strict=True))
        shared = [objects[source, None] for source in _SHARED]
        self._link("libvgpu.so", shared, None, None)
        self._link_driver([objects[source, None] for source in _DRIVER])
        nvml = [objects["nvml.cpp", None]]
        self._link("libnvidia-ml.so.1", nvml, None, sorted(_defined_functions(nvml)))
        for stem, library in libraries.items():
            self._link_library(library, [objects[source, stem] for source in _LIBRARY_SOURCES.get(stem, ())])
        preload = ["libvgpu.so", "libcuda.so.1", "libnvidia-ml.so.1"]
        preload += [_file_name(library) for library in libraries.values()]
        versions = {"cuda": str(header_version(self.cuda.headers)), "compiler": _compiler_version(self.compiler)}
        versions |= {stem: str(version) for stem, version in self.versions.items()}
        for leftover in (*self.folder.glob("*.o"), *self.folder.glob("*.S"), *self.folder.glob("*.map")):
            leftover.unlink()
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        record = {"preload": preload, "versions": versions, "files": files}
        (self.folder / "build.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _compile(self, source: str, stem: str | None) -> Path:
        target = self.folder / f"{stem or 'common'}-{source}.o"
        cudart = header_version(self.cuda.headers)
        cublas = self.versions.get("cublasLt", cudart * 10)
        defines = [f"-DVGPU_CUDART_VERSION={cudart}", f"-DVGPU_CUBLAS_VERSION={cublas}"]
        if stem is not None:
            defines += [f"-DVGPU_LIBRARY_{stem}", f"-DVGPU_LIBRARY_VERSION={self.versions.get(stem, 0)}"]
        headers = ["-I", str(self.cuda.headers), "-idirafter", str(_SOURCES)]
        self._run([*_FLAGS, *defines, *headers, "-c", str(_SOURCES / source), "-o", str(target)])
        return target

    def _link_library(self, library: CudaLibrary, objects: list[Path]) -> None:
        implemented = _defined_functions(objects)
        assembly = self.folder / f"{library.stem}-stubs.S"
        exports = read_exports(library.path)
        policy, version = stubs.POLICIES[library.stem], self.versions.get(library.stem, 0)
        text = stubs.write_assembly(policy, exports.functions, implemented, version)
        assembly.write_text(text, encoding="utf-8")
        inputs = [*objects, assembly]
        self._link(_file_name(library), inputs, exports.version_node, exports.functions, library.soname)

    def _link_driver(self, objects: list[Path]) -> None:
        header = (self.cuda.headers / "cuda.h").read_text(encoding="utf-8", errors="replace")
        functions, aliases = stubs.driver_functions(header)
        implemented = _defined_functions(objects)
        assembly = self.folder / "driver-stubs.S"
        text = stubs.write_assembly(stubs.DRIVER, functions, implemented, 0) + stubs.write_aliases(aliases)
        assembly.write_text(text, encoding="utf-8")
        self._link("libcuda.so.1", [*objects, assembly], None, {*functions, *implemented})

    def _link(
        self,
        name: str,
        inputs: list[Path],
        node: str | None,
        exported: Collection[str] | None,
        soname: str | None = None,
    ) -> None:
        options = ["-shared", "-fPIC", f"-Wl,-soname,{soname or name}", "-Wl,-z,now", "-o", str(self.folder / name)]
        if exported is not None:
            script = self.folder / f"{name}.map"
            script.write_text(stubs.write_version_script(node, exported), encoding="utf-8")
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
    """Names of the C functions that objects define for others."""
    names = set()
    for path in objects:
        with path.open("rb") as file:
            table = ELFFile(file).get_section_by_name(".symtab")
            if not isinstance(table, SymbolTableSection):
                continue
            for symbol in table.iter_symbols():
                defined = symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] == "STB_GLOBAL"
                if defined and symbol["st_info"]["type"] == "STT_FUNC" and not symbol.name.startswith("_Z"):
                    names.add(symbol.name)
    return names


_ASK_VERSIONS = """
import ctypes, json, sys
answers = {}
for stem, path, function, returned in json.loads(sys.argv[1]):
    try:
        library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        ask = getattr(library, function)
        ask.restype = ctypes.c_size_t if returned else ctypes.c_int
        value = ctypes.c_int()
        answers[stem] = ask() if returned else (ask(ctypes.byref(value)), value.value)[1]
    except (OSError, AttributeError):
        pass
print(json.dumps(answers))
"""


def _library_versions(libraries: Sequence[CudaLibrary]) -> dict[str, int]:
    """What the real libraries say their versions are, asked in a process of its own; none of these needs a GPU."""
    questions = []
    for library in libraries:
        policy = stubs.POLICIES[library.stem]
        if policy.version is not None:
            questions.append([library.stem, str(library.path), policy.version, policy.version_is_returned])
    text = json.dumps(questions)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-I", "-c", _ASK_VERSIONS, text]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return dict(json.loads(answer.stdout)) if answer.returncode == 0 else {}
