"""Building the stub libraries, and every way in which that can fail."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_lowmem.virtual_gpu import VirtualGPUUnavailable, build, compiling, discovery


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_temporary_folder", lambda: tmp_path / "temporary")
    return tmp_path / "cache"


def builds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("build.json"))


@pytest.mark.usefixtures("built", "cache")
def test_a_build_is_made_once_and_leaves_only_libraries(capfd):
    first = build.ensure_built()
    assert "compiling" in capfd.readouterr().err
    assert build.ensure_built() == first
    assert capfd.readouterr().err == ""
    assert {path.suffix for path in first.folder.iterdir()} <= {".so", ".1", ".json", ".0", ".2"} | {
        Path(library.name).suffix for library in first.preload
    }
    assert all(library.exists() for library in first.preload)
    assert int(first.versions["cuda"]) >= 12000


@pytest.mark.usefixtures("built")
def test_two_processes_that_build_at_once_build_once(cache):
    program = "from qlora_lowmem.virtual_gpu.build import ensure_built; print(ensure_built().folder)"

    def one_process(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one_process, range(2))
    assert first.stdout == second.stdout
    assert (first.stderr + second.stderr).count("compiling") == 1
    assert len(builds(cache)) == 1
    assert not list((cache / "virtual_gpu").glob(".build-*"))


@pytest.mark.usefixtures("built", "cache")
def test_a_read_only_cache_gives_way_to_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, "/proc/nowhere")  # where nobody can write, root included
    record = '{"preload": [], "versions": {}}'
    monkeypatch.setattr(build.Builder, "build", lambda self: (self.folder / "build.json").write_text(record))
    assert build.ensure_built().folder.is_relative_to(tmp_path / "temporary")


@pytest.mark.usefixtures("built", "cache")
def test_nowhere_to_write_says_so(monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, "/proc/nowhere")
    monkeypatch.setattr(build, "_temporary_folder", lambda: Path("/proc/nowhere/either"))
    with pytest.raises(VirtualGPUUnavailable, match=f"Set {build.CACHE_VARIABLE}"):
        build.ensure_built()


@pytest.mark.usefixtures("built")
def test_a_cache_with_a_space_in_its_path_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "a folder"))
    with pytest.raises(VirtualGPUUnavailable, match="must not hold spaces"):
        build.ensure_built()


def test_no_compiler_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "find_spec", lambda _name: None)
    with pytest.raises(VirtualGPUUnavailable, match="pip install ziglang"):
        build.find_compiler()


def test_the_compiler_from_pypi_serves_where_there_is_no_other(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "find_spec", lambda _name: object())
    assert build.find_compiler() == (sys.executable, "-m", "ziglang", "c++")


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(VirtualGPUUnavailable, match="no-such-compiler"):
        build.find_compiler()


@pytest.mark.usefixtures("built")
def test_a_compiler_that_fails_is_quoted(cache, tmp_path, monkeypatch):
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho 'error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(VirtualGPUUnavailable, match="no such luck"):
        build.ensure_built()
    assert builds(cache) == []


@pytest.fixture
def installation(request, tmp_path):
    """The CUDA libraries of this environment, laid out as links that a test may break."""
    request.getfixturevalue("built")
    cuda = discovery.find_cuda(frozenset({"cudart"}))
    root = tmp_path / "nvidia"
    (root / "lib").mkdir(parents=True)
    library = root / "lib" / cuda.libraries[0].soname
    library.symlink_to(cuda.libraries[0].path)
    shutil.copytree(cuda.headers, root / "include", symlinks=True, ignore=lambda *_: ["crt"])
    return discovery.CudaLibrary("cudart", cuda.libraries[0].soname, library)


@pytest.fixture
def no_toolkit(monkeypatch):
    monkeypatch.setattr(discovery, "_toolkits", list)


@pytest.mark.usefixtures("no_toolkit")
def test_headers_lie_beside_the_library(installation):
    assert discovery._find_headers(installation) == installation.path.parent.parent / "include"


@pytest.mark.usefixtures("no_toolkit")
def test_missing_headers_say_what_to_install(installation):
    (installation.path.parent.parent / "include" / "cuda.h").unlink()
    with pytest.raises(VirtualGPUUnavailable, match="pip install nvidia-cuda-runtime"):
        discovery._find_headers(installation)


@pytest.mark.usefixtures("no_toolkit")
def test_headers_of_another_cuda_are_not_used(installation):
    header = installation.path.parent.parent / "include" / "cuda_runtime_api.h"
    header.unlink()
    header.write_text("#define CUDART_VERSION  11080\n")
    with pytest.raises(VirtualGPUUnavailable, match=r"Found only .*CUDA 11"):
        discovery._find_headers(installation)


def test_a_toolkits_headers_serve_where_the_wheels_have_none(installation, tmp_path, monkeypatch):
    include = installation.path.parent.parent / "include"
    toolkit = tmp_path / "toolkit"
    include.rename((toolkit / "include").parent.mkdir() or toolkit / "include")
    monkeypatch.setattr(discovery, "_toolkits", lambda: [toolkit])
    assert discovery._find_headers(installation) == toolkit / "include"


def test_a_build_of_torch_without_cuda_says_so(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    spec = discovery.importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(discovery.importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(VirtualGPUUnavailable, match="build without CUDA"):
        discovery.find_cuda(frozenset({"cudart"}))


def test_no_torch_says_so(monkeypatch):
    monkeypatch.setattr(discovery.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(VirtualGPUUnavailable, match="pip install torch"):
        discovery.find_cuda(frozenset({"cudart"}))


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")])
def test_other_platforms_say_so(monkeypatch, system, machine):
    monkeypatch.setattr(discovery.sys, "platform", system)
    monkeypatch.setattr(discovery.platform, "machine", lambda: machine)
    with pytest.raises(VirtualGPUUnavailable, match="Linux on x86-64"):
        discovery.find_cuda(frozenset({"cudart"}))


@pytest.mark.usefixtures("built")
def test_a_library_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(discovery, "_linked_libraries", lambda _folder: (["libcudart.so.99"], []))
    monkeypatch.setattr(discovery, "_toolkits", list)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(VirtualGPUUnavailable, match=r"libcudart\.so\.99"):
        discovery.find_cuda(frozenset({"cudart"}))


@pytest.mark.usefixtures("built")
def test_every_function_of_the_real_libraries_is_answered():
    """Nothing that PyTorch may call can reach a real library: the stubs export all of its names."""
    cuda = discovery.find_cuda(frozenset(build.stubs.policies()))
    folder = build.ensure_built().folder
    for library in cuda.libraries:
        ours, real = folder / compiling.file_name(library), library.path
        assert discovery.functions_of(ours) == discovery.functions_of(real) != set()
        assert discovery.version_node(ours) == discovery.version_node(real)


# Prints whether a run of it read libraries or started a process.
KNOWN = """
import subprocess, sys
from qlora_lowmem.virtual_gpu.build import ensure_built
subprocess.run = None
print(ensure_built().folder, "elftools" in sys.modules)
"""


@pytest.mark.usefixtures("built")
def test_a_known_build_is_found_without_reading_libraries_or_asking_the_compiler():
    folder = build.ensure_built().folder
    answer = subprocess.run([sys.executable, "-c", KNOWN], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(folder), "False"]


@pytest.mark.parametrize("changed", ["content", "time"])
@pytest.mark.usefixtures("built")
def test_a_source_that_changed_is_another_build_and_one_that_was_touched_is_the_same(
    tmp_path, cache, monkeypatch, changed
):
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    record = '{"preload": [], "versions": {}}'
    monkeypatch.setattr(build.Builder, "build", lambda self: (self.folder / "build.json").write_text(record))
    first = build.ensure_built()
    if changed == "content":
        with (sources / "sparse.cpp").open("a") as file:
            file.write("// more\n")
    else:
        os.utime(sources / "sparse.cpp", (1, 1))
    assert (build.ensure_built() == first) is (changed == "time")
    assert len(builds(cache)) == (2 if changed == "content" else 1)


@pytest.mark.usefixtures("built", "cache")
def test_two_installations_that_share_a_cache_have_a_build_each(tmp_path, monkeypatch):
    record = '{"preload": [], "versions": {}}'
    monkeypatch.setattr(build.Builder, "build", lambda self: (self.folder / "build.json").write_text(record))
    found = {"one": set(), "other": set()}
    original = build.SOURCES
    for name in ("one", "other", "one", "other"):
        sources = tmp_path / name / "csrc"
        if not sources.exists():
            shutil.copytree(original, sources)
            (sources / "sparse.cpp").write_text(f"// {name}")
        monkeypatch.setattr(build, "SOURCES", sources)
        found[name].add(build.ensure_built().folder)
    assert len(found["one"]) == len(found["other"]) == 1
    assert found["one"] != found["other"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": 3}'])
@pytest.mark.usefixtures("built")
def test_a_damaged_note_of_what_was_found_is_made_again(cache, monkeypatch, text):
    record = '{"preload": [], "versions": {}}'
    monkeypatch.setattr(build.Builder, "build", lambda self: (self.folder / "build.json").write_text(record))
    first = build.ensure_built()
    (note,) = (cache / "virtual_gpu").glob("found-*.json")
    complete = note.read_text()
    note.write_text(text)
    assert build.ensure_built() == first
    assert note.read_text() == complete


def test_importing_the_package_does_not_import_torch():
    program = "import sys, qlora_lowmem.virtual_gpu; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.usefixtures("built")
def test_the_record_of_a_build_names_what_it_is_for():
    record = json.loads((build.ensure_built().folder / "build.json").read_text())
    assert record["preload"][0] == "libvgpu.so"
    assert {"cuda", "compiler"} <= set(record["versions"])
