"""What a program leaves behind is found by its parent, whatever it has changed of itself."""

import multiprocessing
import os
import subprocess
import time

from qlora_lowmem.virtual_gpu import processes


def lose_children(pids: "multiprocessing.SimpleQueue[int]") -> None:
    """In a process of its own: adopts what a shell leaves behind, and ends it with a child of its own."""
    processes.adopt_orphans()
    shell = "setsid env -i sleep 60 >/dev/null 2>&1 & echo $!"
    orphan = int(subprocess.check_output(["/bin/sh", "-c", shell]))
    child, spared = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    assert set(processes.children()) == {orphan, child.pid, spared.pid}
    processes.end_children(frozenset({spared.pid}))
    assert processes.children() == [spared.pid]
    processes.end_children()
    pids.put(len(processes.children()))


def test_orphans_are_adopted_and_ended_with_the_children() -> None:
    context = multiprocessing.get_context("fork")
    pids: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
    process = context.Process(target=lose_children, args=(pids,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert pids.get() == 0


def test_a_program_is_told_as_it_is_whatever_its_bytes() -> None:
    import marshal

    order = processes.write_order(["a", os.fsdecode(b"\xff")], {"B": os.fsdecode(b"\xfe")}, None)
    assert int.from_bytes(order[:8], "little") == len(order) - 8
    assert marshal.loads(order[8:]) == ([b"a", b"\xff"], {b"B": b"\xfe"}, None)


def test_nobody_waits_for_a_process_that_cannot_be_ended(monkeypatch) -> None:
    monkeypatch.setattr(processes, "children", lambda: [1])
    monkeypatch.setattr(processes, "send", lambda *_: None)
    monkeypatch.setattr(processes, "_END_SECONDS", 0.05)
    started = time.monotonic()
    processes.end_children()
    assert time.monotonic() - started < 5
