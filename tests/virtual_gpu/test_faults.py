"""Every way in which a virtual GPU is known to fail: how each ends, and that nothing stays behind.

One function a fault, by its name. Each runs with an empty folder for temporary files, which must be empty again
afterwards, with no process left that was started on a machine whose account lay there.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_lowmem.virtual_gpu import (
    Card,
    JobFailedError,
    JobResult,
    Report,
    Server,
    UnknownCardError,
    VirtualGPUError,
    VirtualGPUUnavailable,
    build,
    discovery,
    environment,
    get_card,
    launch,
    read_report,
    run,
)

MIB = 2**20
LAPTOP = get_card("rtx-4050-laptop-6gb")
CUDART = "import ctypes; cudart = ctypes.CDLL('libcudart.so.{major}'); address = ctypes.c_void_p()\n"


class Bench:
    """What a fault needs: folders of its own, patches, and quick programs on a card."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, server: Server) -> None:
        self.folder, self.patch, self.server = folder, patch, server
        self.temporary = folder / "temporary"
        self.stderr = ""

    def run(self, program: str, card: Card = LAPTOP, **options: object) -> Report:
        """Runs a program that calls the CUDA runtime itself: PyTorch's import would take most of the time."""
        major = int(build.ensure_built().versions["cuda"]) // 1000
        command = [sys.executable, "-c", CUDART.format(major=major) + program]
        with (self.folder / "stderr").open("w") as stderr:
            try:
                return run(command, card, stderr=stderr, **options)  # type: ignore[arg-type]
            finally:
                self.stderr = (self.folder / "stderr").read_text()

    def torch(self, program: str, *wrapper: str) -> Report:
        with (self.folder / "stderr").open("w") as stderr:
            report = run([*wrapper, sys.executable, "-c", "import torch\n" + program], LAPTOP, stderr=stderr)
        self.stderr = (self.folder / "stderr").read_text()
        return report

    def job(self, function: str, card: Card = LAPTOP, timeout: float = 60, **kwargs: object) -> JobResult:
        return self.server.submit(f"virtual_gpu.jobs:{function}", dict(kwargs), card, timeout=timeout).result()

    def cli(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
        assert "Traceback" not in answer.stderr
        return answer

    def cache(self) -> list[Path]:
        """An empty cache, and builds that take no time; returns the list that each build adds itself to."""
        self.patch.setenv(build.CACHE_VARIABLE, str(self.folder / "cache"))
        self.patch.setattr(build, "_temporary_folder", lambda: self.folder / "second")
        made: list[Path] = []
        known = {"lib.so": hashlib.sha256(b"ELF").hexdigest()}
        record = json.dumps({"preload": ["lib.so"], "versions": {}, "files": known})

        def quick(builder: build.Builder) -> None:
            made.append(builder.folder)
            (builder.folder / "lib.so").write_text("ELF")
            (builder.folder / "build.json").write_text(record)

        self.patch.setattr(build.Builder, "build", quick)
        return made


Fault = Callable[[Bench], None]
FAULTS: list[Fault] = []


def fault(function: Fault) -> Fault:
    FAULTS.append(function)
    return function


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[Bench]:
    bench = Bench(tmp_path, monkeypatch, server)
    bench.temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(bench.temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(bench.temporary))
    yield bench
    deadline = time.monotonic() + 60
    while left := [*bench.temporary.iterdir(), *processes_of(tmp_path)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


def processes_of(folder: Path) -> list[str]:
    """Living processes of machines whose account lies in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"VGPU_ACCOUNT={folder}".encode() in variables:
            found.append(process.name)
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- building the libraries --------------------------------------------------------------------------------------


@fault
def no_compiler(bench: Bench) -> None:
    bench.patch.setenv("PATH", str(bench.folder))
    bench.patch.delenv("CXX", raising=False)
    bench.patch.setattr(build, "find_spec", lambda _name: None)
    with pytest.raises(VirtualGPUUnavailable, match="pip install ziglang"):
        build.ensure_built()


@fault
def a_compiler_that_is_not_there(bench: Bench) -> None:
    answer = bench.cli("--card", LAPTOP.name, "--", "true", CXX="no-such-compiler")
    assert answer.returncode == 2
    assert "no-such-compiler" in answer.stderr


def failing_compiler(bench: Bench, script: str) -> str:
    compiler = bench.folder / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    bench.patch.setenv("CXX", str(compiler))
    bench.patch.setenv(build.CACHE_VARIABLE, str(bench.folder / "cache"))
    bench.patch.setattr(build, "_temporary_folder", lambda: bench.folder / "second")
    with pytest.raises(VirtualGPUUnavailable) as caught:
        build.ensure_built()
    assert not list((bench.folder / "cache").rglob("*.so*"))
    return str(caught.value)


@fault
def a_compiler_that_fails(bench: Bench) -> None:
    assert "no such luck" in failing_compiler(bench, "echo 'error: no such luck' >&2; exit 1")


@fault
def a_compiler_that_crashes(bench: Bench) -> None:
    assert "could not compile" in failing_compiler(bench, '[ "$1" = --version ] || kill -SEGV $$')


@fault
def a_disk_that_is_full_while_compiling(bench: Bench) -> None:
    message = failing_compiler(bench, '[ "$1" = --version ] || { echo "No space left on device" >&2; exit 1; }')
    for folder in ("cache", "second"):
        assert f"{bench.folder / folder}/virtual_gpu (No space left on device)" in message
    assert "on a disk with room" in message


@fault
def a_cache_from_whose_disk_nothing_may_be_executed(bench: Bench) -> None:
    """The loader would warn, and start programs without the virtual card."""
    bench.cache()
    look = os.statvfs
    bench.patch.setattr(build.os, "statvfs", lambda path: Mount(look(path), noexec="second" not in str(path)))
    assert build.ensure_built().folder.is_relative_to(bench.folder / "second")
    bench.patch.setattr(build.os, "statvfs", lambda path: Mount(look(path), noexec=True))
    with pytest.raises(VirtualGPUUnavailable, match="mounted noexec"):
        build.ensure_built()


class Mount:
    def __init__(self, found: os.statvfs_result, *, noexec: bool) -> None:
        self.f_flag = found.f_flag | os.ST_NOEXEC if noexec else found.f_flag & ~os.ST_NOEXEC


@fault
def a_cache_in_which_others_may_write(bench: Bench) -> None:
    bench.cache()
    (bench.folder / "cache").mkdir()
    (bench.folder / "cache").chmod(0o777)
    assert build.ensure_built().folder.is_relative_to(bench.folder / "second")
    (bench.folder / "second" / "virtual_gpu").chmod(0o777)
    with pytest.raises(VirtualGPUUnavailable, match="others may write there"):
        build.ensure_built()


@fault
def libraries_that_do_not_load(bench: Bench) -> None:
    """Undefined symbols, as a compiler of C alone leaves them; an empty file; one that does not answer."""
    source, preload = bench.folder / "lib.cpp", bench.folder / "lib.so"
    compiler = build.find_compiler()
    (bench.folder / "builder").mkdir()
    builder = build.Builder(bench.folder / "builder", SimpleNamespace(headers=Path(), libraries=()), compiler)
    for text, said in {
        "void* operator new(unsigned long); void* undefined() { return new int; }": "undefined symbol: _Znwm",
        "": "not loaded",
        'extern "C" int cudaGetDeviceCount(int* count) { *count = 7; return 0; }': "they say 7",
    }.items():
        preload.write_bytes(bytes(4096))
        if text:
            source.write_text(text)
            options = ["-shared", "-fPIC", "-nostdlib", "-Wl,-z,now", str(source), "-o", str(preload)]
            subprocess.run([*compiler, *options], check=True)
        with pytest.raises(VirtualGPUUnavailable, match=said):
            builder._verify([preload])


@fault
def programs_that_are_started_without_the_libraries(bench: Bench) -> None:
    """Whatever the reason: no program is started then."""
    made = build.Build(bench.folder, (bench.folder / "lib.so",), {})
    (bench.folder / "lib.so").write_bytes(bytes(4096))
    bench.patch.setattr(launch, "ensure_built", lambda: made)
    with pytest.raises(VirtualGPUUnavailable, match="do not load the virtual GPU's libraries"):
        run(["touch", str(bench.folder / "started")], LAPTOP)
    assert not (bench.folder / "started").exists()


@fault
def a_build_that_was_killed(bench: Bench) -> None:
    """Its leftovers go with the next build; those of a build that runs stay."""
    bench.cache()
    root = bench.folder / "cache" / "virtual_gpu"
    for key in ("dead", "alive"):
        (root / f".build-{key}-x" / "build").mkdir(parents=True)
    for folder in (root, root.parent):
        folder.chmod(0o700)
    with (root / "alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.ensure_built()
    assert [path.name for path in root.glob(".build-*")] == [".build-alive-x"]


@fault
def a_read_only_cache(bench: Bench) -> None:
    bench.cache()
    bench.patch.setenv(build.CACHE_VARIABLE, "/proc/nowhere")  # where nobody can write, root included
    assert build.ensure_built().folder.is_relative_to(bench.folder / "second")


@fault
def nowhere_to_write(bench: Bench) -> None:
    bench.patch.setenv(build.CACHE_VARIABLE, "/proc/nowhere")
    bench.patch.setattr(build, "_temporary_folder", lambda: Path("/proc/nowhere/either"))
    with pytest.raises(VirtualGPUUnavailable, match=f"Set {build.CACHE_VARIABLE}"):
        build.ensure_built()


@fault
def a_cache_whose_path_cannot_be_preloaded(bench: Bench) -> None:
    bench.patch.setenv(build.CACHE_VARIABLE, str(bench.folder / "a folder"))
    with pytest.raises(VirtualGPUUnavailable, match="must not hold spaces"):
        build.ensure_built()


@fault
def two_that_build_at_once(bench: Bench) -> None:
    made = bench.cache()
    quick = build.Builder.build
    bench.patch.setattr(build.Builder, "build", lambda builder: (time.sleep(0.3), quick(builder)))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.ensure_built(), range(2))
    assert first == second
    assert len(made) == 1


@fault
def a_build_that_is_interrupted(bench: Bench) -> None:
    made = bench.cache()
    quick = build.Builder.build

    def interrupted(builder: build.Builder) -> None:
        quick(builder)
        raise KeyboardInterrupt

    with bench.patch.context() as patch:
        patch.setattr(build.Builder, "build", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.ensure_built()
    assert not list((bench.folder / "cache").rglob("build.json"))
    assert build.ensure_built().folder.exists()
    assert len(made) == 2


@fault
def a_lock_that_a_dead_process_left(bench: Bench) -> None:
    bench.cache()
    folder = build.ensure_built().folder
    lock = folder.with_name(f"{folder.name}.lock")
    assert lock.exists()
    (folder / "build.json").unlink()
    hold = f"import fcntl, os; f = open({str(lock)!r}); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", hold], check=False)
    assert build.ensure_built().folder == folder


@fault
def a_cached_library_that_was_cut_short(bench: Bench) -> None:
    made = bench.cache()
    (build.ensure_built().folder / "lib.so").write_text("EL")
    assert (build.ensure_built().folder / "lib.so").read_text() == "ELF"
    assert len(made) == 2


@fault
def a_cached_library_with_a_flipped_bit(bench: Bench) -> None:
    made = bench.cache()
    (build.ensure_built().folder / "lib.so").write_text("ELG")
    assert (build.ensure_built().folder / "lib.so").read_text() == "ELF"
    assert len(made) == 2


@fault
def a_cached_library_that_is_gone(bench: Bench) -> None:
    made = bench.cache()
    (build.ensure_built().folder / "lib.so").unlink()
    assert (build.ensure_built().folder / "lib.so").exists()
    assert len(made) == 2


@fault
def a_build_record_that_is_no_json(bench: Bench) -> None:
    made = bench.cache()
    (build.ensure_built().folder / "build.json").write_text("{")
    build.ensure_built()
    assert len(made) == 2


def installation(bench: Bench) -> tuple[discovery.CudaLibrary, Path]:
    """A library with its headers beside it, both empty; no toolkit."""
    bench.patch.setattr(discovery, "_toolkits", list)
    library = bench.folder / "nvidia" / "lib" / "libcudart.so.13"
    include = bench.folder / "nvidia" / "include"
    library.parent.mkdir(parents=True)
    include.mkdir()
    library.touch()
    (include / "cuda.h").touch()
    return discovery.CudaLibrary("cudart", library.name, library), include / "cuda_runtime_api.h"


@fault
def no_headers(bench: Bench) -> None:
    library, _ = installation(bench)
    with pytest.raises(VirtualGPUUnavailable, match="pip install nvidia-cuda-runtime"):
        discovery._find_headers(library)


@fault
def headers_of_another_cuda(bench: Bench) -> None:
    library, header = installation(bench)
    header.write_text("#define CUDART_VERSION  11080\n")
    with pytest.raises(VirtualGPUUnavailable, match=r"Found only .*CUDA 11"):
        discovery._find_headers(library)


@fault
def headers_without_a_version(bench: Bench) -> None:
    library, header = installation(bench)
    header.write_text("// nothing\n")
    with pytest.raises(VirtualGPUUnavailable, match="are not there"):
        discovery._find_headers(library)


@fault
def no_torch(bench: Bench) -> None:
    bench.patch.setattr(discovery.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(VirtualGPUUnavailable, match="pip install torch"):
        discovery.find_cuda(frozenset({"cudart"}))


@fault
def a_torch_without_cuda(bench: Bench) -> None:
    (bench.folder / "torch").mkdir()
    (bench.folder / "torch" / "__init__.py").touch()
    spec = discovery.importlib.util.spec_from_file_location("torch", bench.folder / "torch" / "__init__.py")
    bench.patch.setattr(discovery.importlib.util, "find_spec", lambda _name: spec)
    with pytest.raises(VirtualGPUUnavailable, match="build without CUDA"):
        discovery.find_cuda(frozenset({"cudart"}))


@fault
def a_torch_with_its_runtime_linked_in(bench: Bench) -> None:
    bench.patch.setattr(discovery, "_linked_libraries", lambda _folder: (["libc.so.6"], []))
    with pytest.raises(VirtualGPUUnavailable, match="does not link libcudart"):
        discovery.find_cuda(frozenset({"cudart"}))


@fault
def a_cuda_library_that_is_gone(bench: Bench) -> None:
    bench.patch.setattr(discovery, "_linked_libraries", lambda _folder: (["libcudart.so.99"], []))
    bench.patch.setattr(discovery, "_toolkits", list)
    bench.patch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(VirtualGPUUnavailable, match=r"libcudart\.so\.99"):
        discovery.find_cuda(frozenset({"cudart"}))


@fault
def another_platform(bench: Bench) -> None:
    bench.patch.setattr(discovery.platform, "machine", lambda: "aarch64")
    with pytest.raises(VirtualGPUUnavailable, match="Linux on x86-64"):
        discovery.find_cuda(frozenset({"cudart"}))


# --- asking for what there is not --------------------------------------------------------------------------------


@fault
def an_unknown_card(_: Bench) -> None:
    with pytest.raises(UnknownCardError, match="Did you mean rtx-4050-laptop-6gb"):
        get_card("rtx-4050-6gb")


@fault
def no_cards_at_all(bench: Bench) -> None:
    with pytest.raises(ValueError, match="1 to 16 cards"):
        bench.run("", count=0)


@fault
def more_cards_than_a_machine_has(bench: Bench) -> None:
    with pytest.raises(ValueError, match="1 to 16 cards"):
        bench.run("", count=17)


@fault
def less_memory_than_the_context_takes(_: Bench) -> None:
    with pytest.raises(ValueError, match="the CUDA context alone takes"):
        LAPTOP.with_memory(LAPTOP.context_bytes)


@fault
def a_program_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(FileNotFoundError):
        run(["no-such-program"], LAPTOP)
    assert bench.cli("--card", LAPTOP.name, "--", "no-such-program").returncode == 2


@fault
def a_program_that_may_not_be_run(bench: Bench) -> None:
    (bench.folder / "plain").write_text("text")
    with pytest.raises(PermissionError):
        run([str(bench.folder / "plain")], LAPTOP)


@fault
def no_gpu_to_measure(bench: Bench) -> None:
    answer = bench.cli("--print-card", LD_LIBRARY_PATH="", CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 2
    assert "--list-cards" in answer.stderr


# --- programs that end badly ---------------------------------------------------------------------------------------


@fault
def a_card_that_is_full(bench: Bench) -> None:
    report = bench.run("assert cudart.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(6 << 30)) == 2")
    assert report.exit_code == 0
    assert report.peak_device_bytes == LAPTOP.context_bytes


@fault
def memory_that_runs_out_while_a_model_loads(bench: Bench) -> None:
    result = bench.job("out_of_memory_while_loading", mib=256)
    assert "CUDA out of memory. Tried to allocate 256.00 MiB" in result.value
    assert result.report.peak_device_bytes <= LAPTOP.total_bytes


@fault
def a_second_context_that_does_not_fit(bench: Bench) -> None:
    program = """
import subprocess, sys
assert cudart.cudaFree(None) == 0
child = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).cudaFree(None))"
sys.exit(subprocess.call([sys.executable, "-c", child, cudart._name]))
"""
    card = LAPTOP.with_memory(LAPTOP.context_bytes + MIB)
    assert bench.run(program, card).exit_code == 2  # cudaErrorMemoryAllocation
    result = bench.job("matmul_step", LAPTOP.with_memory(LAPTOP.context_bytes + MIB), size=64)
    assert "OutOfMemoryError" in (result.error or "")


@fault
def a_function_that_is_missing(bench: Bench) -> None:
    report = bench.run("assert cudart.cudaGraphLaunch(None, None) == 801")
    assert report.missing_functions == ("cudaGraphLaunch",)
    assert "called cudaGraphLaunch, which is not implemented; report it" in bench.stderr


@fault
def a_fork_after_cuda_is_in_use(bench: Bench) -> None:
    result = bench.job("fork_after_use")
    assert "Cannot re-initialize CUDA in forked subprocess" in result.value


@fault
def a_spawned_process_that_is_killed(bench: Bench) -> None:
    program = """
import os, subprocess, sys
assert cudart.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(64 << 20)) == 0
child = "import ctypes, os, sys; c = ctypes.CDLL(sys.argv[1]); a = ctypes.c_void_p()\\n"
child += "c.cudaMalloc(ctypes.byref(a), ctypes.c_size_t(64 << 20)); os.kill(os.getpid(), 9)"
assert subprocess.call([sys.executable, "-c", child, cudart._name]) == -9
free, total = ctypes.c_size_t(), ctypes.c_size_t()
cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
assert total.value - free.value == (450 + 64) << 20
"""
    report = bench.run(program)
    assert report.exit_code == 0
    assert report.peak_device_bytes == 2 * (LAPTOP.context_bytes + 64 * MIB)


@fault
def a_program_that_is_killed(bench: Bench) -> None:
    report = bench.run("import os; cudart.cudaFree(None); os.kill(os.getpid(), 9)")
    assert report.exit_code == 128 + signal.SIGKILL
    assert report.peak_device_bytes == LAPTOP.context_bytes


@fault
def a_program_that_reads_the_cards_memory_itself(bench: Bench) -> None:
    report = bench.run("cudart.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(8)); ctypes.string_at(address, 8)")
    assert report.exit_code == 128 + signal.SIGSEGV


@fault
def a_program_over_its_time_in_sessions_of_its_own(bench: Bench) -> None:
    program = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(60)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        bench.run(program, timeout=1)


@fault
def a_daemon_that_outlives_its_program(bench: Bench) -> None:
    program = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    assert bench.run(program).exit_code == 0


@fault
def a_launcher_that_is_killed(bench: Bench) -> None:
    pids = bench.folder / "pids"
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
open({str(pids)!r} + ".part", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(pids)!r} + ".part", {str(pids)!r})
time.sleep(60)
"""
    command = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", "--card", LAPTOP.name, "--"]
    launcher = subprocess.Popen([*command, sys.executable, "-c", program])
    wait_for(pids.exists)
    launcher.kill()
    launcher.wait()
    for pid in pids.read_text().split():
        wait_for(lambda pid=int(pid): is_gone(pid))


@fault
def a_keeper_that_is_killed(bench: Bench) -> None:
    """Of all that stands between, the program's parent alone could say how it ended: the program goes with it."""
    program = (
        f"open({str(bench.folder / 'pid')!r}, 'w').write(str(os.getpid())); os.kill(os.getppid(), 9); time.sleep(60)"
    )
    with pytest.raises(VirtualGPUError, match="keeps the program was killed"):
        bench.run(f"import os, time; {program}")
    wait_for(lambda: is_gone(int((bench.folder / "pid").read_text())))


ORPHAN = """
import sys
sys.path.insert(0, sys.argv[1])
import jobs
print(jobs.leave_an_orphan(), flush=True)
"""


@fault
def a_process_that_has_left_its_parent_its_session_and_its_environment(bench: Bench) -> None:
    with (bench.folder / "pid").open("w") as printed:
        run([sys.executable, "-c", ORPHAN, str(Path(__file__).parent)], LAPTOP, stdout=printed)
    assert is_gone(int((bench.folder / "pid").read_text()))


# --- what a program does to its environment ------------------------------------------------------------------------


@fault
def an_account_that_is_overwritten(bench: Bench) -> None:
    program = (
        "import os; open(os.environ['VGPU_ACCOUNT'], 'wb').write(b'x' * 200000); assert cudart.cudaFree(None) == 100"
    )
    with pytest.raises(ValueError, match="not the account of a virtual machine"):
        bench.run(program)
    assert "no device is visible" in bench.stderr


@fault
def an_account_that_is_gone(bench: Bench) -> None:
    with pytest.raises(FileNotFoundError):
        bench.run("import os; os.unlink(os.environ['VGPU_ACCOUNT'])")


@fault
def an_account_that_points_nowhere(bench: Bench) -> None:
    report = bench.run("import os; os.environ['VGPU_ACCOUNT'] = '/nowhere'; assert cudart.cudaFree(None) == 100")
    assert report.exit_code == 0
    assert "/nowhere is not a virtual machine's account; no device is visible" in bench.stderr


@fault
def an_account_that_is_not_named(bench: Bench) -> None:
    report = bench.run("import os; del os.environ['VGPU_ACCOUNT']; assert cudart.cudaFree(None) == 100")
    assert report.exit_code == 0
    assert "VGPU_ACCOUNT is gone from the environment; no device is visible" in bench.stderr


@fault
def a_report_folder_that_is_removed(bench: Bench) -> None:
    result = bench.server.submit("virtual_gpu.jobs:remove_the_report", {}, LAPTOP, timeout=60)
    with pytest.raises(JobFailedError, match="its report cannot be read"):
        result.result()


@fault
def a_damaged_file_of_peaks(bench: Bench) -> None:
    environment(LAPTOP, report=bench.folder / "report")
    (bench.folder / "report" / "torch-1.json").write_text('{"peaks"')
    with pytest.raises(ValueError, match="delimiter"):
        read_report(bench.folder / "report", LAPTOP, 0)


@fault
def a_full_disk_when_the_peaks_are_written(_: Bench) -> None:
    ours, theirs = os.pipe()
    program = """
import resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
torch.empty(300 << 20, dtype=torch.uint8, device="cuda")
"""
    report = run([sys.executable, "-c", program], LAPTOP, stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours) as told:
        assert "peaks could not be written" in told.read()
    assert not report.complete
    assert report.peak_device_bytes == LAPTOP.context_bytes + 300 * MIB


@fault
def an_environment_that_is_emptied(bench: Bench) -> None:
    result = bench.job("empty_the_environment")
    assert result.exit_code == 0
    assert "VGPU_ACCOUNT is gone from the environment; this process' peaks are lost" in result.output_tail


@fault
def a_program_that_drops_pythonpath(bench: Bench) -> None:
    report = bench.torch("torch.ones(1, device='cuda')", "env", "-u", "PYTHONPATH")
    assert report.exit_code == 0
    assert not report.complete
    assert report.notices == ("no_hooks",)
    assert bench.stderr.count("without the hooks in PYTHONPATH") == 1


@fault
def a_program_that_drops_ld_preload(bench: Bench) -> None:
    report = bench.torch("assert not torch.cuda.is_available()", "env", "-u", "LD_PRELOAD")
    assert report.exit_code == 0
    assert "LD_PRELOAD was changed on the way to this process" in bench.stderr


@fault
def an_extension_with_a_runtime_of_its_own(bench: Bench) -> None:
    """Told once, and only where something asks for the card through it."""
    source, library = bench.folder / "extension.cpp", bench.folder / "extension.so"
    source.write_text(
        '__attribute__((section(".nv_fatbin"), used)) static const char code[64] = {1};\n'
        'extern "C" int cudaMalloc(void**, unsigned long);\n'
        'extern "C" int allocate() { void* memory; return cudaMalloc(&memory, 64); }\n'
    )
    runtime = next(discovery.find_torch()[0].parents[2].glob("nvidia/**/libcudart_static.a"))
    command = [*build.find_compiler(), "-shared", "-fPIC", "-o", str(library), str(source), str(runtime)]
    subprocess.run([*command, "-Wl,--exclude-libs,ALL", "-lpthread", "-ldl", "-lrt"], check=True)
    unused = bench.job("load_and_use", library=str(library), called=None)
    assert (unused.report.notices, "linked into it" in unused.output_tail) == ((), False)
    result = bench.job("load_and_use", library=str(library), called="allocate")
    assert result.output_tail.count(f"{library} has the CUDA runtime linked into it") == 1
    assert result.report.notices == ("static_runtime",)
    assert result.report.missing_functions == ()


# --- workers ---------------------------------------------------------------------------------------------------------


@fault
def a_job_that_is_killed(bench: Bench) -> None:
    result = bench.job("kill_itself")
    assert (result.exit_code, result.signal) == (137, 9)
    assert not result.report.complete


@fault
def a_job_over_its_time(bench: Bench) -> None:
    result = bench.job("hold_and_sleep", timeout=0.5, seconds=60)
    assert result.timed_out
    assert result.exit_code == 137


@fault
def a_job_that_raises(bench: Bench) -> None:
    assert bench.job("fail", message="as it should").error == "ValueError: as it should"


@fault
def a_job_that_is_no_function(bench: Bench) -> None:
    assert "nothing" in (bench.job("nothing").error or "")


@fault
def a_result_that_json_cannot_hold(bench: Bench) -> None:
    assert "not JSON serializable" in (bench.job("not_json").error or "")


@fault
def a_job_that_leaves_a_process(bench: Bench) -> None:
    pid = bench.job("leave_a_process").value
    wait_for(lambda: is_gone(pid))


@fault
def a_job_that_leaves_an_orphan(bench: Bench) -> None:
    """It ends with the job where no other runs, and with the server at the latest."""
    pid = bench.job("leave_an_orphan").value
    wait_for(lambda: is_gone(pid))


@fault
def a_worker_without_its_modules(_: Bench) -> None:
    with (
        Server(["no_such_module"]) as server,
        pytest.raises(JobFailedError, match="No module named 'no_such_module'"),
    ):
        server.submit("virtual_gpu.jobs:card", {}, LAPTOP).result(60)


@fault
def a_server_whose_program_is_killed_while_its_modules_are_imported(bench: Bench) -> None:
    """As a plan's, which takes seconds for that; whatever the job had in its folder for temporary files goes too."""
    begun = bench.folder / "begun"
    (bench.folder / "slow_module.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    program = "import sys; from qlora_lowmem.virtual_gpu import Server, get_card; server = Server(['slow_module']); "
    program += f"sys.path.insert(0, {str(bench.folder)!r}); "
    program += "server.submit('virtual_gpu.jobs:card', {}, get_card('t4-16gb')).result()"
    started = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: list(bench.temporary.glob("qlora_lowmem.scratch-*/parent-*/account.bin")))
    wait_for(lambda: processes_of(bench.folder))
    wait_for(begun.exists)
    started.kill()
    started.wait()


@fault
def a_server_that_is_closed(bench: Bench) -> None:
    server = Server()
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.submit("virtual_gpu.jobs:card", {}, LAPTOP)
    assert list(bench.temporary.iterdir()) == []


@fault
def a_worker_on_a_machine_without_a_compiler(bench: Bench) -> None:
    bench.patch.setenv("CXX", "no-such-compiler")
    with Server() as server, pytest.raises(VirtualGPUUnavailable, match="no-such-compiler"):
        server.submit("virtual_gpu.jobs:card", {}, LAPTOP).result(60)


@pytest.mark.parametrize("case", FAULTS, ids=[function.__name__ for function in FAULTS])
def test_a_fault_has_a_clear_end_and_leaves_nothing(bench: Bench, case: Fault) -> None:
    case(bench)


def test_there_are_30_faults_or_more() -> None:
    assert len(FAULTS) >= 30
