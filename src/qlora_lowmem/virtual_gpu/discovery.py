"""What the installed PyTorch is linked against: its CUDA libraries and their headers, found without importing it."""

import contextlib
import glob
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cards import VirtualGPUUnavailable

# The parts of PyTorch that link CUDA libraries; all but the first may be absent in some builds.
_TORCH_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")
_TOOLKIT_FOLDERS = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr")
HEADERS = ("cuda.h", "cuda_runtime_api.h")
# What decides, beside the folder of PyTorch and the files themselves, which are found.
VARIABLES = ("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class CudaLibrary:
    """A CUDA library that PyTorch links.

    Attributes:
        stem: `cudart` of `libcudart.so.13`.
        soname: the name it is loaded by.
        path: the installed file.
    """

    stem: str
    soname: str
    path: Path


@dataclass(frozen=True)
class CudaInstallation:
    """The CUDA side of the PyTorch in this Python environment: what it links, and the folder of the headers."""

    libraries: tuple[CudaLibrary, ...]
    headers: Path


def find_torch() -> list[Path]:
    """The parts of the installed PyTorch that link CUDA libraries.

    Raises:
        VirtualGPUUnavailable: this is not Linux on x86-64, or there is no PyTorch, or a CPU build.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise VirtualGPUUnavailable(
            f"the virtual GPU preloads libraries for Linux on x86-64; this is {sys.platform} on {platform.machine()}. "
            "Use such a machine (WSL 2 will do), or measure on a GPU."
        )
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise VirtualGPUUnavailable(
            f"PyTorch is not installed for {sys.executable}. Install a CUDA build: python -m pip install torch"
        )
    folder = Path(spec.origin).parent
    parts = [path for name in _TORCH_LIBRARIES if (path := folder / "lib" / name).exists()]
    if not parts or parts[0].name != _TORCH_LIBRARIES[0]:
        raise VirtualGPUUnavailable(
            f"the PyTorch in {folder} is a build without CUDA, and the virtual GPU runs PyTorch's own CUDA code. "
            "Install a CUDA build (no GPU is needed for it): python -m pip install --force-reinstall torch"
        )
    return parts


def find_cuda(stems: frozenset[str]) -> CudaInstallation:
    """The CUDA libraries among `stems` that the installed PyTorch links, and the headers of their version.

    Raises:
        VirtualGPUUnavailable: no CUDA build of PyTorch, a library or its headers missing, or of different versions.
    """
    torch = find_torch()
    sonames, folders = _linked_libraries(torch)
    wanted = [soname for soname in sonames if _stem(soname) in stems]
    if "cudart" not in map(_stem, wanted):
        raise VirtualGPUUnavailable(
            f"the PyTorch in {torch[0].parents[1]} does not link libcudart.so dynamically, so its calls cannot be "
            "answered. Install the wheel from PyPI: python -m pip install torch"
        )
    libraries = tuple(CudaLibrary(_stem(soname), soname, _locate(soname, folders)) for soname in wanted)
    cudart = next(library for library in libraries if library.stem == "cudart")
    return CudaInstallation(libraries, _find_headers(cudart))


def _stem(soname: str) -> str:
    return soname.removeprefix("lib").split(".so")[0]


def _linked_libraries(parts: list[Path]) -> tuple[list[str], list[Path]]:
    """Names that PyTorch's libraries need, in their order, and the folders that they are looked for in."""
    sonames: dict[str, None] = {}
    folders: dict[Path, None] = {}
    for path in parts:
        with _section(path, ".dynamic") as dynamic:
            for tag in dynamic.iter_tags() if dynamic else ():
                kind = str(tag.entry.d_tag).removeprefix("DT_").lower()
                if kind == "needed":
                    sonames[tag.needed] = None
                elif kind in ("rpath", "runpath"):
                    for entry in getattr(tag, kind).split(":"):
                        folders[Path(entry.replace("$ORIGIN", str(path.parent))).resolve()] = None
    return list(sonames), list(folders)


@contextlib.contextmanager
def _section(path: Path, name: str) -> Iterator[Any]:
    """A section of a library or an object file, or None."""
    # Imported where a file is read: with a build in the cache none is.
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        yield ELFFile(file).get_section_by_name(name)


def functions_of(path: Path, table: str = ".dynsym") -> set[str]:
    """Names of the C functions that a library exports, or an object file defines for others (`.symtab`)."""
    with _section(path, table) as symbols:
        return {
            symbol.name
            for symbol in (symbols.iter_symbols() if symbols else ())
            if symbol["st_shndx"] != "SHN_UNDEF"
            and symbol["st_info"]["bind"] != "STB_LOCAL"
            and symbol["st_info"]["type"] in ("STT_FUNC", "STT_GNU_IFUNC")
            and not symbol.name.startswith("_Z")  # C++ that leaked out; nothing links it
        }


def version_node(path: Path) -> str:
    """The version that a library's functions carry: the last that it defines, for the first is the library itself.

    Empty where it defines none.
    """
    with _section(path, ".gnu.version_d") as defined:
        names = [str(next(iter(auxiliaries)).name) for _, auxiliaries in (defined.iter_versions() if defined else ())]
    return names[-1] if names else ""


def _locate(soname: str, folders: list[Path]) -> Path:
    places = [*folders, *map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))]
    for toolkit in _toolkits():
        places += [toolkit / "lib64", toolkit / "targets/x86_64-linux/lib", toolkit / "lib/x86_64-linux-gnu"]
    for place in places:
        if (place / soname).exists():
            return place / soname
    searched = ", ".join(map(str, places[:6]))
    raise VirtualGPUUnavailable(
        f"{soname}, which PyTorch links, is not in any of {searched}, ... Reinstall PyTorch with its dependencies: "
        "python -m pip install --force-reinstall torch"
    )


def _toolkits() -> list[Path]:
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [Path(found) for pattern in (*named, *_TOOLKIT_FOLDERS) for found in sorted(glob.glob(pattern))]  # noqa: PTH207


def _find_headers(cudart: CudaLibrary) -> Path:
    """The folder of the headers that belong to the library: beside it in wheels, or a toolkit's."""
    beside = cudart.path.parent.parent / "include"
    toolkits = [folder / "include" for folder in _toolkits()]
    wanted = cudart.soname.rpartition(".")[2]
    wrong = []
    for folder in (beside, *toolkits, *(folder.parent / "targets/x86_64-linux/include" for folder in toolkits)):
        major = header_version(folder) // 1000
        if major and str(major) == wanted:
            return folder
        if major:
            wrong.append(f"{folder} (CUDA {major})")
    found = f" Found only {', '.join(wrong)}." if wrong else ""
    raise VirtualGPUUnavailable(
        f"the CUDA {wanted} headers cuda.h and cuda_runtime_api.h that belong to {cudart.path} are not there.{found} "
        f"Install PyTorch's own package of them: python -m pip install nvidia-cuda-runtime"
        f"{'-cu' + wanted if int(wanted) < 13 else ''}"
    )


def header_version(folder: Path) -> int:
    """CUDART_VERSION of the headers in a folder, 13000 for CUDA 13.0; 0 where there are none."""
    if not all((folder / name).exists() for name in HEADERS):
        return 0
    text = (folder / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0
