"""Compiles the stub libraries into a folder, and tries them."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import account, discovery, stubs
from .cards import VirtualGPUUnavailable, get_card
from .discovery import CudaInstallation, CudaLibrary, functions_of, header_version

SOURCES = Path(__file__).with_name("csrc")
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


def hash_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Builder:
    """Makes the libraries in an empty folder, with the record of what they are."""

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
        preload = ["libvgpu.so", "libcuda.so.1", "libnvidia-ml.so.1", *map(file_name, libraries.values())]
        versions = {"cuda": str(self.cudart), "compiler": compiler_version(self.compiler)}
        versions |= {stem: str(version) for stem, version in self.versions.items()}
        for leftover in (*self.folder.glob("*.o"), *self.folder.glob("*.S"), *self.folder.glob("*.map")):
            leftover.unlink()
        self._verify([self.folder / name for name in preload])
        files = {path.name: hash_of(path) for path in self.folder.iterdir()}
        record = {"preload": preload, "versions": versions, "files": files}
        (self.folder / "build.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    def _verify(self, preload: list[Path]) -> None:
        """Starts a program with the libraries, which must all be loaded and answer a call."""
        machine = self.folder / "account"
        account.create(machine, get_card(_ANY_CARD), 1)
        environment = {"LD_PRELOAD": " ".join(map(str, preload)), "VGPU_ACCOUNT": str(machine)}
        command = [sys.executable, "-I", "-S", "-c", _ASK_WHETHER_LOADED, *map(str, preload)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        machine.unlink()
        if answer.returncode != 0 or answer.stderr:
            raise VirtualGPUUnavailable(
                f"what {self.compiler[0]} made of the virtual GPU's libraries cannot be used (exit code "
                f"{answer.returncode}): {answer.stderr.strip()[-500:]}\nName a C++ compiler with CXX (g++, clang++)."
            )

    def _compile(self, stem: str, source: str) -> Path:
        target = self.folder / f"{stem}-{source}.o"
        defines = [f"-DVGPU_CUDART_VERSION={self.cudart}", f"-DVGPU_CUBLAS_VERSION={self.versions['cublasLt']}"]
        defines += [f"-DVGPU_LIBRARY_{stem}", f"-DVGPU_LIBRARY_VERSION={self.versions.get(stem, 0)}"]
        headers = ["-I", str(self.cuda.headers), "-idirafter", str(SOURCES)]
        self._run([*_FLAGS, *defines, *headers, "-c", str(SOURCES / source), "-o", str(target)])
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
        self._link(file_name(library), inputs, exports, discovery.version_node(library.path), library.soname)

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
        # What the compiler itself keeps for a while lies on the same disk, so that a full one has one name.
        environment = os.environ | {"TMPDIR": str(self.folder), "LC_ALL": "C"}
        command = [*self.compiler, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if answer.returncode != 0:
            if (full := os.strerror(errno.ENOSPC)) in answer.stderr:
                raise OSError(errno.ENOSPC, full)
            last = "\n".join(answer.stderr.splitlines()[:8])
            raise VirtualGPUUnavailable(
                f"{self.compiler[0]} could not compile the virtual GPU's libraries against {self.cuda.headers}:\n"
                f"{last}\nName another compiler with CXX, or report this with the lines above."
            )


def file_name(library: CudaLibrary) -> str:
    """`libcudart-virtual.so.13`, loaded under the name `libcudart.so.13`.

    PyTorch opens all real libraries by path as soon as it finds a file called `libcudart.so` in its address space: they
    would never be called, but loading them takes a second.
    """
    return library.soname.replace(".so", "-virtual.so")


def compiler_version(compiler: Sequence[str]) -> str:
    """The command of a compiler, and the first line that it says of itself."""
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return f"{' '.join(compiler)}: {answer.stdout.splitlines()[0] if answer.stdout else 'unknown'}"


def _defined_functions(objects: Sequence[Path]) -> set[str]:
    return {name for path in objects for name in functions_of(path, ".symtab")}


_ANY_CARD = "t4-16gb"
_ASK_WHETHER_LOADED = """
import ctypes, sys
every, count = ctypes.CDLL(None), ctypes.c_int()
with open("/proc/self/maps") as maps:
    loaded = {line.split(None, 5)[-1].strip() for line in maps}
if missing := set(sys.argv[1:]) - loaded:
    sys.exit(f"not loaded: {', '.join(sorted(missing))}")
if (error := every.cudaGetDeviceCount(ctypes.byref(count))) or count.value != 1:
    sys.exit(f"asked for the number of cards, which is 1, they say {count.value} (error {error})")
"""

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
