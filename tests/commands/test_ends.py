"""How commands end: by signals at any moment, with standard streams that are closed, full, or that nobody reads."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qlora_lowmem.commands.frame import guarded
from qlora_lowmem.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from qlora_lowmem.memory.profile import LiveMemory, write_live
from qlora_lowmem.scratch import scratch_folder

READS = "import os; open('found', 'w').write(str([os.readlink(f'/proc/self/fd/{n}') for n in range(3)]))"
STRIKES = "import os\nos.kill(os.getpid(), {number:d})\n"


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "")])
def test_a_signal_while_the_packages_above_a_command_are_imported(
    number: signal.Signals, said: str, tmp_path: Path
) -> None:
    """`python -m` imports `qlora_lowmem.data` before it comes to the command."""
    (tmp_path / "msgspec.py").write_text(STRIKES.format(number=number))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "qlora_lowmem.data", "--help"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (128 + number, "", said)


def test_an_interrupt_before_a_command_has_its_signals_is_no_traceback(tmp_path: Path) -> None:
    finder = "import sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
    finder += "        if name == 'qlora_lowmem.signals':\n            import os; os.kill(os.getpid(), 2)\n"
    (tmp_path / "sitecustomize.py").write_text(f"{finder}sys.meta_path.insert(0, Finder())\n")
    command = [sys.executable, "-m", "qlora_lowmem", "--version"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", "")


class Ignoring:
    """What is raised as it goes is ignored by Python."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


@pytest.fixture
def heard_hang_up() -> Iterator[None]:
    """What started the tests may have had them ignore it, as `nohup` does, and commands leave it at that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hang_up")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_midst_of_work_undoes_it(
    number: signal.Signals, ignored: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folders: list[str] = []

    def work() -> int:
        with tempfile.TemporaryDirectory() as folder:
            folders.append(folder)
            if ignored:
                Ignoring(number)
            else:
                os.kill(os.getpid(), number)
            time.sleep(10)
        return EXIT_OK

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    if number is signal.SIGINT:
        assert guarded(work) == EXIT_INTERRUPTED
        assert capsys.readouterr().err == "interrupted\n"
    else:
        with pytest.raises(SystemExit) as ended:
            guarded(work)
        assert ended.value.code == 128 + number
    assert not Path(folders[0]).exists()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_what_a_command_runs_ends_by_itself_when_the_command_is_interrupted(tmp_path: Path) -> None:
    """Not killed: it removes its temporary folder first."""
    child = "import pathlib, sys, time\nfrom qlora_lowmem.commands.frame import guarded\n"
    child += "from qlora_lowmem.scratch import scratch_folder\ndef run():\n    with scratch_folder():\n"
    child += "        pathlib.Path('ready').touch(); time.sleep(60)\nsys.exit(guarded(run))\n"
    script = (
        "import os, sys; from qlora_lowmem.children import run_child; from qlora_lowmem.commands.frame import guarded\n"
    )
    script += f"sys.exit(guarded(lambda: run_child([sys.executable, '-c', {child!r}], os.environ).returncode))"
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (None, b"interrupted\n")
    assert process.returncode == EXIT_INTERRUPTED
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_a_killed_command_leaves_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = (
        "import os; from qlora_lowmem.scratch import scratch_folder\nwith scratch_folder(): os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", killed], env=env, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as mine:
        assert {*tmp_path.iterdir()} == {left, mine}, "it may be new, without its lock yet"
        for each in (left, mine):
            os.utime(each, (0, 0))
        with scratch_folder() as other:
            assert {*tmp_path.iterdir()} == {mine, other}
    assert list(tmp_path.iterdir()) == []


def ended(words: str, **streams: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qlora_lowmem", *words.split()]
    told = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | streams
    return subprocess.run(command, text=True, timeout=60, check=False, **told)  # type: ignore[call-overload, no-any-return]


def test_a_full_standard_output_is_said_and_a_full_standard_error_stops_nothing() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    run = ended("data check nowhere.jsonl", stderr=full)
    assert (run.returncode, run.stdout) == (EXIT_USAGE, "")
    run = ended("--version", stderr=full)
    assert (run.returncode, run.stdout[:13]) == (EXIT_OK, "qlora-lowmem ")
    run = ended("--version", stdout=full)
    os.close(full)
    lost = "error: standard output cannot be written (No space left on device): what was to be there is lost\n"
    assert (run.returncode, run.stderr) == (EXIT_USAGE, lost)


def test_the_watch_ends_with_its_reader(tmp_path: Path) -> None:
    started = psutil.Process().create_time()
    write_live(tmp_path, LiveMemory(os.getpid(), started, time.time(), "mine", "cpu", phase="training"))
    command = [sys.executable, "-m", "qlora_lowmem.watch", "--output-dir", str(tmp_path), "--json", "--interval", "0.1"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    assert watch.stderr is not None
    assert json.loads(watch.stdout.readline())
    watch.stdout.close()
    assert (watch.wait(30), watch.stderr.read()) == (EXIT_OK, "")


@pytest.mark.usefixtures("built")
def test_a_program_on_a_virtual_gpu_gets_no_pipe_of_ours(tmp_path: Path) -> None:
    program = READS
    command = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", "--card", "t4-16gb", "--", "python", "-c", program]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    run = subprocess.run(shell, cwd=tmp_path, timeout=60, check=False)
    assert run.returncode == EXIT_USAGE  # it asked for no card
    assert (tmp_path / "found").read_text() == str(["/dev/null"] * 3)


@pytest.mark.usefixtures("built")
def test_nor_does_one_that_a_program_without_standard_streams_runs(tmp_path: Path) -> None:
    script = "import os, sys; from qlora_lowmem.virtual_gpu import get_card, run; os.closerange(0, 3); "
    script += f"run([sys.executable, '-c', {READS!r}], get_card('t4-16gb'))"
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60, check=False).returncode == 0
    assert (tmp_path / "found").read_text() == str(["/dev/null"] * 3)
