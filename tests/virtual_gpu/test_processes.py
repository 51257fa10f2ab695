"""Whose a process is, also at the moment its program is being started."""

from pathlib import Path

import pytest

from qlora_lowmem.virtual_gpu import processes

ACCOUNT = "/somewhere/account.bin"


def entry(folder: Path, pid: int, environ: bytes = b"", cmdline: bytes = b"", has_program: bool = True) -> Path:
    """What /proc shows of a process."""
    process = folder / str(pid)
    process.mkdir()
    (process / "environ").write_bytes(environ)
    (process / "cmdline").write_bytes(cmdline)
    if has_program:
        (process / "exe").symlink_to("/bin/true")
    return process


def test_a_process_whose_program_is_being_started_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = entry(tmp_path, 7)

    def start(_seconds: float) -> None:
        (starting / "environ").write_bytes(f"A=b\0{processes.ACCOUNT_VARIABLE}={ACCOUNT}\0".encode())
        (starting / "cmdline").write_bytes(b"sleep\x0060\0")

    monkeypatch.setattr(processes, "_PROCESSES", tmp_path)
    monkeypatch.setattr(processes.time, "sleep", start)
    assert list(processes.members(ACCOUNT)) == [7]


def test_nobody_waits_for_processes_that_have_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(tmp_path, 1, cmdline=b"env\0-i\0")
    entry(tmp_path, 2, has_program=False)  # the kernel's own, or one that has ended
    entry(tmp_path, 3, environ=b"VGPU_ACCOUNT=/another/account.bin\0", cmdline=b"true\0")
    monkeypatch.setattr(processes, "_PROCESSES", tmp_path)
    monkeypatch.setattr(processes.time, "sleep", lambda _seconds: pytest.fail("it waited"))
    assert not list(processes.members(ACCOUNT))
