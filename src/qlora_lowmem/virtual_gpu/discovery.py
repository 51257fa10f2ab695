"""What the installed PyTorch is linked against: its CUDA libraries and their headers, found without importing it."""

import glob
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection
from elftools.elf.sections import SymbolTableSection

from .errors import VirtualGPUUnavailable

# The parts of PyTorch that link CUDA libraries; all but the first may be absent in some builds.
_TORCH_LIBRARIES = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")
_TOOLKIT_FOLDERS = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr")


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
class Exports:
    """What a library offers to those that link it.

    Attributes:
        version_node: the symbol version that its functions carry, or None.
        functions: their names.
    """

    version_node: str | None
    functions: tuple[str, ...]


@dataclass(frozen=True)
class CudaInstallation:
    """The CUDA side of the PyTorch in this Python environment."""

    torch_folder: Path
    libraries: tuple[CudaLibrary, ...]
    headers: Path


def require_supported_platform() -> None:
    """Raises VirtualGPUUnavailable unless this is Linux on x86-64."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise VirtualGPUUnavailable(
            f"the virtual GPU preloads libraries for Linux on x86-64; this is {sys.platform} on {platform.machine()}. "
            "Use such a machine (WSL 2 will do), or measure on a GPU."
        )


def find_cuda(stems: frozenset[str]) -> CudaInstallation:
    """The CUDA libraries among `stems` that the installed PyTorch links, and the headers of their version.

    Raises:
        VirtualGPUUnavailable: no PyTorch, a CPU build, a library or its headers missing, or of different versions.
    """
    require_supported_platform()
    torch_folder = _torch_folder()
    sonames, folders = _linked_libraries(torch_folder)
    wanted = [soname for soname in sonames if _stem(soname) in stems]
    if "cudart" not in map(_stem, wanted):
        raise VirtualGPUUnavailable(
            f"the PyTorch in {torch_folder} does not link libcudart.so dynamically, so its calls cannot be answered. "
            "Install the wheel from PyPI: python -m pip install torch"
        )
    libraries = tuple(CudaLibrary(_stem(soname), soname, _locate(soname, folders)) for soname in wanted)
    cudart = next(library for library in libraries if library.stem == "cudart")
    return CudaInstallation(torch_folder, libraries, _find_headers(cudart))


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise VirtualGPUUnavailable(
            f"PyTorch is not installed for {sys.executable}. Install a CUDA build: python -m pip install torch"
        )
    folder = Path(spec.origin).parent
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        raise VirtualGPUUnavailable(
            f"the PyTorch in {folder} is a build without CUDA, and the virtual GPU runs PyTorch's own CUDA code. "
            "Install a CUDA build (no GPU is needed for it): python -m pip install --force-reinstall torch"
        )
    return folder


def _stem(soname: str) -> str:
    return soname.removeprefix("lib").split(".so")[0]


def _linked_libraries(torch_folder: Path) -> tuple[list[str], list[Path]]:
    """Names that PyTorch's libraries need, in their order, and the folders that they are looked for in."""
    sonames: dict[str, None] = {}
    folders: dict[Path, None] = {}
    for name in _TORCH_LIBRARIES:
        path = torch_folder / "lib" / name
        if not path.exists():
            continue
        for tag, value in _dynamic_entries(path):
            if tag == "DT_NEEDED":
                sonames[value] = None
            else:
                for entry in value.split(":"):
                    folders[Path(entry.replace("$ORIGIN", str(path.parent))).resolve()] = None
    return list(sonames), list(folders)


def _dynamic_entries(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".dynamic")
        if not isinstance(section, DynamicSection):
            return
        for tag in section.iter_tags():
            if tag.entry.d_tag == "DT_NEEDED":
                yield "DT_NEEDED", tag.needed  # type: ignore[attr-defined]
            elif tag.entry.d_tag == "DT_RPATH":
                yield "DT_RPATH", tag.rpath  # type: ignore[attr-defined]
            elif tag.entry.d_tag == "DT_RUNPATH":
                yield "DT_RUNPATH", tag.runpath  # type: ignore[attr-defined]


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


def read_exports(path: Path) -> Exports:
    """The functions that a shared library exports, from its symbol table.

    Raises:
        VirtualGPUUnavailable: it has none.
    """
    with path.open("rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym")
        if not isinstance(symbols, SymbolTableSection):
            raise VirtualGPUUnavailable(f"{path} has no dynamic symbols; reinstall PyTorch with its dependencies")
        functions = sorted(
            {
                symbol.name
                for symbol in symbols.iter_symbols()
                if symbol["st_shndx"] != "SHN_UNDEF"
                and symbol["st_info"]["type"] in ("STT_FUNC", "STT_GNU_IFUNC")
                and not symbol.name.startswith("_Z")  # C++ that leaked out; nothing links it
            }
        )
        return Exports(_version_node(elf), tuple(functions))


def _version_node(elf: ELFFile) -> str | None:
    """The last symbol version that a library defines: the first is the library itself."""
    section = elf.get_section_by_name(".gnu.version_d")
    if not isinstance(section, GNUVerDefSection):
        return None
    names = [next(iter(auxiliaries)).name for _, auxiliaries in section.iter_versions()]
    return names[-1] if names else None


def _find_headers(cudart: CudaLibrary) -> Path:
    """The folder of cuda.h and cuda_runtime_api.h that belong to the library: beside it in wheels, or a toolkit's."""
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
    if not (folder / "cuda.h").exists() or not (folder / "cuda_runtime_api.h").exists():
        return 0
    text = (folder / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0
