"""The view of a running job: what is near the wall, what spills, which job is gone, and what is drawn of it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pynvml
import pytest
from rich.console import Console

from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import DoesNotFitError
from qlora_lowmem.memory.profile import MEMORY_FILE, LiveMemory, read_live, write_live
from qlora_lowmem.recipe import Recipe, Run
from qlora_lowmem.units import GIB, MIB
from qlora_lowmem.virtual_gpu import get_card
from qlora_lowmem.watch.judgement import (
    FULL_SHARE,
    STALE_SECONDS,
    Frame,
    Spill,
    Watch,
    full_since,
    headroom,
    notices,
    rooms,
    spill,
)
from qlora_lowmem.watch.readings import CardReading, Reading, System, is_running
from qlora_lowmem.watch.view import line, render, sparkline

main = partial(run_command, "watch")

TOTAL = 6 * GIB
NOW = 1_800_000_000.0
JOB = LiveMemory(
    pid=os.getpid(),
    started=psutil.Process().create_time(),
    time=NOW,
    recipe="optimised",
    device="cuda",
    card="NVIDIA GeForce RTX 4050 Laptop GPU",
    gpu="GPU-0",
    phase="training",
    step=12,
    steps=500,
    allocated=GIB,
    reserved=2 * GIB,
    peak_allocated=GIB + MIB,
    peak_reserved=2 * GIB,
    outside=450 * MIB,
    limit=5 * GIB,
    total=TOTAL,
)


def reading(used: int | None = 3 * GIB, job: LiveMemory | None = JOB, **changes: Any) -> Reading:
    """A card that holds `used` bytes (None: no card answers) and a job on it."""
    card = None
    if used is not None:
        processes = {os.getpid(): None, 7: 300 * MIB}
        card = CardReading("NVIDIA GeForce RTX 4050 Laptop GPU", "GPU-0", TOTAL, used, TOTAL - used, processes)
    found = Reading(NOW, True, card, process_bytes=2 * GIB, resident_bytes=700 * MIB, job=job)
    return dataclasses.replace(found, **changes)


def cpu_recipe(output_dir: Path) -> Recipe:
    return Recipe(name="optimised", run=Run(device="cpu", output_dir=str(output_dir)))


def job(**changes: Any) -> LiveMemory:
    return dataclasses.replace(JOB, **changes)


def kinds(now: Reading, warn: str | int = "95%", spilled: Spill | None = None, system: System = "linux") -> list[str]:
    return [notice.kind for notice in notices(now, spilled or Spill("none"), system, warn)]


def drawn(frame: Frame, width: int = 80) -> str:
    console = Console(record=True, width=width, force_terminal=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(render(frame))
    return console.export_text()


def frame(now: Reading, spilled: Spill | None = None, warn: str = "95%") -> Frame:
    found = spilled or Spill("impossible")
    return Frame(now, found, notices(now, found, "linux", warn), 3 * GIB, (GIB, 3 * GIB))


@pytest.mark.parametrize(("warn", "limit"), [("50%", 3 * GIB), ("5.5 GiB", 11 * GIB // 2), (str(TOTAL), TOTAL)])
def test_the_wall_is_near_at_the_limit_and_not_one_byte_under(warn: str, limit: int) -> None:
    alone = {"job": None}
    assert kinds(reading(limit, **alone), int(warn) if warn.isdigit() else warn) == ["wall"]
    assert kinds(reading(limit - 1, **alone), int(warn) if warn.isdigit() else warn) == []


def test_the_jobs_own_cap_is_a_wall_too() -> None:
    cap = 4 * GIB
    near = cap * 95 // 100
    assert kinds(reading(job=job(reserved=near - 1, limit=cap))) == []
    now = reading(job=job(reserved=near, limit=cap))
    (said,) = notices(now, Spill("none"), "linux", "95%")
    assert said.text.startswith("the job's cap is 95.0 % full: 3.800 GiB of 4.000 GiB, 2.800 GiB of it PyTorch's")
    assert headroom(now) == cap - near
    assert [room.name for room in rooms(now)] == ["the job's cap", "the card"]


def test_a_job_without_a_card_here_is_held_against_what_it_says() -> None:
    virtual = reading(None, job(device="virtual"))
    assert rooms(virtual)[-1].used == 2 * GIB + 450 * MIB
    on_cpu = reading(None, job(device="cpu", total=0, limit=0, reserved=0, allocated=0))
    assert (rooms(on_cpu), headroom(on_cpu)) == ((), None)


@pytest.mark.parametrize(("age", "said"), [(STALE_SECONDS, []), (STALE_SECONDS + 1, ["stale"])])
def test_old_figures_are_called_old_while_the_job_runs(age: float, said: list[str]) -> None:
    assert kinds(reading(job=job(time=NOW - age))) == said
    assert kinds(reading(job=job(time=NOW - age), running=False)) == []
    assert kinds(reading(job=job(time=NOW - age, phase="ended"))) == []


def test_linux_does_not_spill() -> None:
    assert spill(reading(GIB), None, "linux") == Spill("impossible")


@pytest.mark.parametrize("system", ["windows", "wsl"])
def test_what_is_reserved_beyond_what_the_card_holds_is_elsewhere(system: System) -> None:
    assert spill(reading(2 * GIB), None, system) == Spill("none")
    assert spill(reading(2 * GIB - 1), None, system) == Spill("estimate", 1)
    assert spill(reading(2 * GIB, job=None), None, system) == Spill("unknown")
    assert kinds(reading(2 * GIB - 1), spilled=Spill("estimate", 1), system=system) == ["spill"]


def test_on_a_full_card_what_the_job_takes_and_the_card_does_not_hold_is_elsewhere() -> None:
    full = int(FULL_SHARE * TOTAL) + 1
    first = reading(full)
    start = full_since(None, first)
    assert start is first
    more = reading(full + 10 * MIB, job(reserved=2 * GIB + 110 * MIB))
    assert full_since(start, more) is first
    assert spill(more, first, "windows") == Spill("estimate", 100 * MIB)
    assert spill(reading(full + 10 * MIB, job(reserved=2 * GIB + 10 * MIB)), first, "windows") == Spill("none")
    assert full_since(start, reading(int(FULL_SHARE * TOTAL) - 1)) is None


def test_the_view_says_it_all_within_80_columns() -> None:
    text = drawn(frame(reading(int(0.96 * TOTAL))))
    for said in (
        "optimised on NVIDIA GeForce RTX 4050 Laptop GPU",
        "5.760 GiB of 6.000 GiB (96 %), 245.8 MiB left",
        "step 12 of 500, training",
        "1.000 GiB allocated, 2.000 GiB reserved",
        "2.000 GiB on the card",
        "700.0 MiB",
        "cannot happen: on Linux",
        "WARNING, near the wall: the card is 96.0 % full",
        "▂▅",
    ):
        assert said in text
    assert max(map(len, text.splitlines())) <= 80
    assert "spilling" in drawn(frame(reading(), Spill("estimate", 300 * MIB)))
    assert "about 300.0 MiB in system memory" in drawn(frame(reading(), Spill("estimate", 300 * MIB)))


def test_a_recipes_name_is_no_markup() -> None:
    assert "[bold]x[/bold]" in drawn(frame(reading(job=job(recipe="[bold]x[/bold]"))))


def test_the_view_of_a_card_with_strangers() -> None:
    text = drawn(frame(reading(job=None, process_bytes=None, resident_bytes=None)))
    assert f"pid {os.getpid()}: not told by the driver" in text
    assert "pid 7: 300.0 MiB" in text


def test_how_a_job_ended() -> None:
    assert "ended: out of GPU memory" in line(frame(reading(job=job(phase="ended", outcome="out of GPU memory"))))
    assert "gone while training (killed?)" in line(frame(reading(running=False)))


def test_a_sparkline_runs_from_empty_to_full() -> None:
    assert sparkline((0, TOTAL // 2, TOTAL), TOTAL) == "▁▅█"
    assert len(sparkline(range(1000), 1000)) == 60


def test_a_process_is_itself_only_with_its_start() -> None:
    me = psutil.Process()
    assert is_running(me.pid, me.create_time())
    assert not is_running(me.pid, me.create_time() - 3600)
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while is_running(child.pid):  # until it has ended; nobody has waited for it yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.wait()
    assert not is_running(child.pid)


def test_a_job_that_is_gone_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_live(tmp_path, job(started=JOB.started - 3600, device="virtual"))
    assert main(["--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("gone while training") == 1


def test_json_is_one_object_a_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_live(tmp_path, job(device="virtual", time=time.time()))
    assert main(["--output-dir", str(tmp_path), "--once", "--json", "--warn", "2 GiB"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["job"] == dataclasses.asdict(read_live(tmp_path))
    assert content["running"] is True
    assert content["headroom_bytes"] == 3 * GIB
    assert content["peak_bytes"] == 2 * GIB + 450 * MIB
    assert [notice["kind"] for notice in content["notices"]] == ["wall"]


def test_a_torn_file_is_refused_at_first_and_waited_out_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dumps(dataclasses.asdict(JOB))
    for torn in (whole[:40], "", "[]", '{"pid": 1}', whole.replace('"step": 12', '"step": "twelve"')):
        (tmp_path / MEMORY_FILE).write_text(torn)
        assert main(["--output-dir", str(tmp_path), "--once"]) == 2
        assert MEMORY_FILE in capsys.readouterr().err
    write_live(tmp_path, job(device="virtual"))
    watch = Watch(str(tmp_path), None, None, "95%")
    (tmp_path / MEMORY_FILE).write_text(whole[:40])
    assert watch.look().reading.job == job(device="virtual")
    write_live(tmp_path, job(device="virtual", pid=1))  # another run in the same folder
    assert watch.look().reading.job == job(device="virtual")
    write_live(tmp_path, job(device="virtual", step=13))
    assert watch.look().reading.job == job(device="virtual", step=13)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output-dir", "nowhere"], "has no memory.json"),
        (["--pid", "999999999"], "no process 999999999"),
        (["--pid", "-1"], "no process -1"),
        (["--interval", "0"], "--interval: 0.0"),
        (["--interval", "nan"], "--interval: nan"),
        (["--warn", "110%"], "--warn: '110%'"),
        (["--warn", "much"], "--warn: 'much'"),
        (["--pid", "1", "--output-dir", "."], "not allowed with argument"),
        (["--onse"], "did you mean --once?"),
    ],
)
def test_what_cannot_be_watched_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--once"]) == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert main(["--once"]) == 2
    printed = capsys.readouterr().err
    assert "no NVIDIA GPU answers here" in printed
    assert "--output-dir" in printed


SECOND = """
import os, subprocess, sys, torch
kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:1")
watch = [sys.executable, "-m", "qlora_lowmem.watch", "--once", "--json", "--pid", str(os.getpid())]
sys.exit(subprocess.run(watch).returncode)
"""


def test_a_process_is_found_on_the_card_that_it_is_on(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    card = get_card("rtx-4050-laptop-6gb")
    run = command("virtual_gpu", "--card", card.name, "--count", "2", "--", sys.executable, "-c", SECOND)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["process_bytes"] == card.context_bytes + 64 * MIB


def test_an_interrupt_ends_it_with_130(tmp_path: Path) -> None:
    write_live(tmp_path, job(device="cpu"))
    command = [sys.executable, "-m", "qlora_lowmem.watch", "--output-dir", str(tmp_path), "--interval", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "step 12 of 500" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_a_heartbeat_tells_step_and_end(tmp_path: Path) -> None:
    from qlora_lowmem.training.progress import Heartbeat

    recipe = cpu_recipe(tmp_path / "run")
    state = SimpleNamespace(global_step=0, max_steps=3)
    with Heartbeat(recipe) as heartbeat:
        assert read_live(tmp_path / "run").phase == "loading"
        heartbeat.on_train_begin(None, state, None)
        state.global_step = 1
        heartbeat.on_step_end(None, state, None)
        assert read_live(tmp_path / "run").step == 0, "twice a second is enough"
    live = read_live(tmp_path / "run")
    assert (live.pid, live.recipe, live.device) == (os.getpid(), "optimised", "cpu")
    assert (live.phase, live.outcome, live.step, live.steps) == ("ended", "done", 1, 3)
    assert live.started == pytest.approx(psutil.Process().create_time())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [MEMORY_FILE]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (DoesNotFitError("too small"), "out of GPU memory"),
        (RuntimeError("bug"), "failed"),
    ],
)
def test_a_heartbeat_tells_what_ended_the_job(tmp_path: Path, error: BaseException, outcome: str) -> None:
    from qlora_lowmem.training.progress import Heartbeat

    recipe = cpu_recipe(tmp_path)
    with pytest.raises(type(error)), Heartbeat(recipe):
        raise error
    assert read_live(tmp_path).outcome == outcome


def test_a_heartbeat_that_cannot_be_written_stops_no_training(tmp_path: Path) -> None:
    from qlora_lowmem.training.progress import Heartbeat

    (tmp_path / "file").touch()
    recipe = cpu_recipe(tmp_path / "file" / "run")
    with Heartbeat(recipe) as heartbeat:
        heartbeat.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1), None)


PROGRAM = """
import os, subprocess, sys, torch
kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
watch = [sys.executable, "-m", "qlora_lowmem.watch", "--once", "--json", "--pid", str(os.getpid())]
sys.exit(subprocess.run(watch).returncode)
"""


def test_a_programs_memory_on_a_virtual_gpu(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    card = get_card("rtx-4050-laptop-6gb")
    run = command("virtual_gpu", "--card", card.name, "--", sys.executable, "-c", PROGRAM)
    assert run.returncode == 0, run.stderr
    content = cast("dict[str, Any]", json.loads(run.stdout))
    taken = card.context_bytes + 64 * MIB
    assert content["card"]["total"] == card.total_bytes
    assert content["card"]["used"] == content["process_bytes"] == taken
    assert content["headroom_bytes"] == card.total_bytes - taken
