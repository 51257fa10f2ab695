"""Programs of their own on virtual cards: exit codes, several processes, what is left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from qlora_lowmem.scratch import scratch_folder
from qlora_lowmem.virtual_gpu import environment, launch, read_report, run
from qlora_lowmem.virtual_gpu.build import find_compiler

MIB = 2**20


def is_running(pid: int | str) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def script(tmp_path):
    """A command that runs the given lines of Python."""

    def write(text: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(text)
        return [sys.executable, "-W", "ignore", str(path)]

    return write


@pytest.mark.usefixtures("built")
def test_a_program_that_uses_no_gpu_reports_nothing_and_is_not_touched(laptop, script):
    report = run(script("import sys; assert 'torch' not in sys.modules; sys.exit(3)"), laptop)
    assert report.exit_code == 3
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes, report.peak_device_bytes) == (0, 0, 0)


@pytest.mark.usefixtures("built")
def test_a_program_ends_through_os_exit_with_its_peaks(laptop, script):
    report = run(
        script("import os, torch; torch.empty(64 << 20, device='cuda', dtype=torch.uint8); os._exit(5)"), laptop
    )
    assert report.exit_code == 5
    assert report.peak_allocated_bytes == 64 * MIB
    assert report.complete


@pytest.mark.usefixtures("built")
def test_two_cards_are_two_accounts(laptop, script):
    program = """
import torch
assert torch.cuda.device_count() == 2
first = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
second = torch.empty(96 << 20, dtype=torch.uint8, device="cuda:1")
assert first.to("cuda:1").device.index == 1
"""
    report = run(script(program), laptop, count=2)
    assert report.exit_code == 0
    assert [device.peak_allocated_bytes for device in report.devices] == [64 * MIB, 160 * MIB]
    assert report.peak_device_bytes == laptop.context_bytes + 160 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("built")
def test_processes_share_a_card_whether_forked_or_spawned(laptop, script):
    program = """
import multiprocessing, sys

def hold(queue):
    import torch
    tensor = torch.empty(200 << 20, dtype=torch.uint8, device="cuda")
    queue.put(torch.cuda.mem_get_info()[0])

if __name__ == "__main__":
    import torch
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=hold, args=(queue,))
        process.start()
        free = queue.get(timeout=60)
        process.join()
        assert process.exitcode == 0
        held = 0 if method == "fork" else 100 << 20
        contexts = 1 if method == "fork" else 2
        assert free == (6 << 30) - contexts * (450 << 20) - held - (200 << 20), (method, free)
        mine = torch.empty(100 << 20, dtype=torch.uint8, device="cuda")
    try:
        bad = multiprocessing.get_context("fork").Process(target=hold, args=(queue,))
        bad.start(); bad.join()
        assert bad.exitcode == 1
    finally:
        bad.kill()
"""
    report = run(script(program), laptop, stderr=subprocess.DEVNULL)
    assert report.exit_code == 0
    assert report.peak_allocated_bytes == 200 * MIB
    assert report.peak_device_bytes == 2 * laptop.context_bytes + 300 * MIB


@pytest.mark.usefixtures("built")
def test_another_process_sees_what_is_in_use_and_what_a_killed_one_held_is_free_again(laptop, tmp_path):
    variables = environment(laptop, report=tmp_path / "report")
    hold = "import torch, time; t = torch.ones(64 << 20, device='cuda'); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], env=variables, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    watch = """
import pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
print(pynvml.nvmlDeviceGetMemoryInfo(handle).used, [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)])
"""

    def watched() -> str:
        return subprocess.check_output([sys.executable, "-c", watch], env=variables, text=True).strip()

    assert watched() == f"{laptop.context_bytes + 256 * MIB} [{holder.pid}]"
    holder.send_signal(signal.SIGKILL)
    # Not waited for yet: a zombie holds no memory either.
    deadline = time.monotonic() + 10
    while is_running(holder.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert watched() == "0 []"
    holder.wait()
    holder.stdout.close()
    report = read_report(tmp_path / "report", laptop, -holder.returncode + 128)
    assert report.exit_code == 137
    assert report.peak_device_bytes == laptop.context_bytes + 256 * MIB
    assert not report.complete


@pytest.mark.usefixtures("built")
def test_a_program_over_its_time_is_stopped_with_its_children(laptop, script, tmp_path):
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        run(script(program), laptop, timeout=2)
    deadline = time.monotonic() + 10
    for pid in (tmp_path / "pids").read_text().split():
        while is_running(pid):  # a killed process needs a moment to go
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.usefixtures("built")
def test_what_a_launcher_leaves_that_is_killed_before_its_program_starts_is_removed_by_the_next(tmp_path, monkeypatch):
    script = "import os; from qlora_lowmem.virtual_gpu import get_card, launch\n"
    script += "launch.variables = lambda *_: os.kill(os.getpid(), 9)\nlaunch.run(['true'], get_card('t4-16gb'))"
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder():
        assert not left.exists()


def test_an_interrupt_of_what_every_python_runs_first_is_no_traceback_of_it():
    strikes = "import importlib.util, os, runpy, signal, sys\nclass Finder:\n    def find_spec(self, name, *_):\n"
    strikes += "        if name == 'importlib.util': os.kill(os.getpid(), 2)\n"
    runs = f"runpy.run_path({str(launch._WORKER / 'sitecustomize.py')!r})\n"
    then = "assert signal.getsignal(2) is signal.default_int_handler; print('listens', flush=True)\n"
    struck = "sys.meta_path.insert(0, Finder()); del sys.modules['importlib.util']\n"
    command = [sys.executable, "-c", strikes + runs + then + struck + runs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-2, "listens\n", "")


def test_a_shadowed_sitecustomize_still_runs(laptop, script, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import builtins; builtins.mine_ran = True")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    program = f"import sitecustomize; assert mine_ran and sitecustomize.__file__.startswith({str(folder)!r})"
    report = run(script(program), laptop, env=os.environ | {"PYTHONPATH": path})
    assert report.exit_code == 0


@pytest.mark.usefixtures("built")
def test_quiet_hides_the_line_about_values(laptop, script, tmp_path):
    with (tmp_path / "err").open("w") as stderr:
        command = script("import torch; torch.ones(1, device='cuda').item()")
        report = run(command, laptop, env=os.environ | {"QLORA_LOWMEM_QUIET": "1"}, stderr=stderr)
    assert report.values_read
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.usefixtures("built")
def test_cuda_visible_devices_hides_cards_from_cuda_but_not_from_nvml(laptop, script):
    program = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
import pynvml, torch
assert torch.cuda.device_count() == 1
tensor = torch.ones(16 << 20, device="cuda")
assert torch.cuda.get_device_properties(0).pci_bus_id == 2
pynvml.nvmlInit()
assert pynvml.nvmlDeviceGetCount() == 2
"""
    report = run(script(program), laptop, count=2)
    assert report.exit_code == 0
    assert [device.peak_device_bytes for device in report.devices] == [0, laptop.context_bytes + 64 * MIB]


@pytest.mark.usefixtures("built")
def test_a_server_ends_with_the_program_that_made_it():
    program = """
import os, signal, sys
from qlora_lowmem.virtual_gpu import Server, get_card
server = Server()
future = server.submit("virtual_gpu.jobs:hold_and_sleep", {"seconds": 60}, get_card("t4-16gb"))
while not any(job.pid for job in list(server._running)):
    pass
parent = next(iter(server._parents.values()))
print(parent._process.pid, *(job.pid for job in server._running), server._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == -signal.SIGKILL
    *pids, folder = answer.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.05)
    while Path(folder).exists():
        assert time.monotonic() < deadline, "its files were left behind"
        time.sleep(0.05)


@pytest.mark.usefixtures("built")
def test_a_thread_that_wants_the_interpreter_while_it_ends_does_not_abort_the_program(laptop, script, tmp_path):
    """As autograd's do, from functions that may not be unwound; see thread_exit.cpp."""
    library = tmp_path / "again.so"
    source = tmp_path / "again.cpp"
    source.write_text(
        "#include <unistd.h>\n"
        'extern "C" void call_again(void (*function)()) noexcept { for (;;) { function(); usleep(100); } }\n'
    )
    subprocess.run([*find_compiler(), "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    program = f"""
import ctypes, threading, time

class EndsSlowly:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # finalization lets other threads ask for the interpreter

def start():
    library = ctypes.CDLL({str(library)!r})
    callback = ctypes.CFUNCTYPE(None)(time.monotonic)
    threading.Thread(target=library.call_again, args=(callback,), daemon=True).start()

start()
time.sleep(0.1)
keep = EndsSlowly()
"""
    assert run(script(program), laptop).exit_code == 0
