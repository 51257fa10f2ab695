"""Whose a process is, also at the moment its program is being started."""

import threading
import time
from pathlib import Path

from qlora_lowmem.virtual_gpu import processes

ACCOUNT = Path("/somewhere/account.bin")


def process(folder, pid, environ=b"", cmdline=b"", exe="/bin/true"):
    entry = folder / str(pid)
    entry.mkdir()
    (entry / "environ").write_bytes(environ)
    (entry / "cmdline").write_bytes(cmdline)
    if exe:
        (entry / "exe").symlink_to(exe)
    return entry


def test_a_process_whose_program_is_being_started_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PROCESSES", tmp_path)
    starting = process(tmp_path, 7)

    def start():
        (starting / "environ").write_bytes(f"A=b\0{processes.ACCOUNT_VARIABLE}={ACCOUNT}\0".encode())
        (starting / "cmdline").write_bytes(b"sleep\x0060\0")

    timer = threading.Timer(0.1, start)
    timer.start()
    assert list(processes.members(ACCOUNT)) == [7]
    timer.join()


def test_no_time_is_lost_on_processes_that_have_no_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PROCESSES", tmp_path)
    process(tmp_path, 1, cmdline=b"env\0-i\0")
    process(tmp_path, 2, exe=None)  # the kernel's own, or one that has ended
    process(tmp_path, 3, environ=b"VGPU_ACCOUNT=/another/account.bin\0", cmdline=b"true\0")
    begin = time.monotonic()
    assert not list(processes.members(ACCOUNT))
    assert time.monotonic() - begin < processes._START_SECONDS / 2
