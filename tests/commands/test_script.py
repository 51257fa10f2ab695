"""The script `qlora-lowmem`: its list, what it says of a name that it does not know, the old names beside the new."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES, write_script
from qlora_lowmem import __version__, environment, signals
from qlora_lowmem.commands import COMMANDS, frame, start
from qlora_lowmem.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE

HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"}

HELPS = """
import contextlib, io, json, runpy, sys
from qlora_lowmem.commands import COMMANDS
from qlora_lowmem.commands.frame import main

def printed(body, *words):
    sys.argv = list(words)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = body()
        except SystemExit as ended:
            code = ended.code
    return [code, out.getvalue()]

said = {"": printed(main, "bin/qlora-lowmem", "--help")}
listing = sorted(sys.modules)
for name, (module, _) in COMMANDS.items():
    new = printed(main, "bin/qlora-lowmem", name, "--help")
    old = printed(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), "", "--help")
    said[name] = [new, old]
print(json.dumps({"said": said, "listing": listing, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, Any]:
    """What every command prints for --help by both its names, and which modules that has imported."""
    run = subprocess.run([sys.executable, "-c", HELPS], capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script as pip makes it."""
    return write_script(tmp_path_factory.mktemp("bin"))


def test_the_list_imports_no_command(helps: dict[str, Any]) -> None:
    code, text = helps["said"][""]
    assert code == EXIT_OK
    assert text.startswith("usage: qlora-lowmem COMMAND [ARGUMENT ...]\n")
    for name, (_, line) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE)
    ours = {module for module in helps["listing"] if module.startswith("qlora_lowmem.commands.")}
    assert ours == {"qlora_lowmem.commands.frame"}


@pytest.mark.parametrize("name", COMMANDS)
def test_old_and_new_names_print_the_same(name: str, helps: dict[str, Any]) -> None:
    shown = []
    progs = (f"qlora-lowmem {name}", f"python -m {COMMANDS[name][0]}")
    for (code, text), prog in zip(helps["said"][name], progs, strict=True):
        assert code == EXIT_OK
        assert text.startswith(f"usage: {prog} ")
        shown.append(" ".join(text.replace(prog, "PROG").split()))
    assert shown[0] == shown[1]
    assert "qlora-lowmem" not in shown[0].replace("qlora-lowmem train", "")


def test_no_help_imports_a_heavy_library(helps: dict[str, Any]) -> None:
    assert not HEAVY & set(helps["modules"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pln"], "qlora-lowmem: no command 'pln'; did you mean plan? (qlora-lowmem --help lists every command)"),
        (["--config", "x.yaml"], "qlora-lowmem: no command '--config' (qlora-lowmem --help lists every command)"),
        (["virtual_gpu"], "did you mean virtual-gpu?"),
        (["merge", "--runn", "x"], "qlora-lowmem merge: the following arguments are required: --run, --to"),
    ],
)
def test_what_it_does_not_know(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main(words) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_without_a_command_it_lists_them_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.main([]) == EXIT_USAGE
    assert "\n  plan " in capsys.readouterr().out
    assert frame.main(["--version"]) == EXIT_OK
    assert capsys.readouterr().out == f"qlora-lowmem {__version__}\n"


def test_a_command_is_recorded_and_started_again_as_it_was_typed(script: Path, tmp_path: Path) -> None:
    """`explain` starts itself again on the virtual card: the record is the child's."""
    target = tmp_path / "peak.json"
    words = ["explain", "--config", str(RECIPES / "demo.yaml"), "--weights", "random", "--model", "granite-4.0-h-1b"]
    words += ["--max-seq-length", "64", "--max-steps", "1", "--json", str(target), "--svg", str(tmp_path / "s")]
    run = subprocess.run([script, *words], capture_output=True, text=True, env=_env(), check=False)
    assert run.returncode == EXIT_OK, run.stderr
    assert json.loads(target.read_text())["environment"]["command"] == f"qlora-lowmem {' '.join(words)}"
    assert (tmp_path / "s").read_text().startswith("<svg "), "whatever its suffix"
    assert {path.name for path in tmp_path.iterdir()} == {"peak.json", "s"}


def test_a_recipe_from_a_pipe_is_explained_too(script: Path, tmp_path: Path) -> None:
    recipe = f"cat {RECIPES / 'demo.yaml'}"
    words = (
        f"--weights random --model granite-4.0-h-1b --max-seq-length 64 --max-steps 1 --json {tmp_path / 'peak.json'}"
    )
    shell = ["bash", "-c", f"{script} explain --config <({recipe}) {words}"]
    run = subprocess.run(shell, capture_output=True, text=True, env=_env(), check=False)
    assert run.returncode == EXIT_OK, run.stderr
    assert json.loads((tmp_path / "peak.json").read_text())["recipe"]["schedule"]["max_steps"] == 1


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(
    ("program", "typed", "words"),
    [
        ("{script}", "qlora-lowmem train", [sys.executable, "{script}", "train"]),
        ("{package}/__main__.py", "python -m qlora_lowmem train", [sys.executable, "-m", "qlora_lowmem", "train"]),
        ("{package}/plan/__main__.py", "python -m qlora_lowmem.train", [sys.executable, "-m", "qlora_lowmem.train"]),
        ("/usr/bin/pytest", "python -m qlora_lowmem.train", [sys.executable, "-m", "qlora_lowmem.train"]),
        ("-c", "python -m qlora_lowmem.train", [sys.executable, "-m", "qlora_lowmem.train"]),
    ],
)
def test_how_another_command_is_called(
    program: str, typed: str, words: list[str], script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"script": script, "package": Path(environment.__file__).parent}
    monkeypatch.setattr(sys, "argv", [program.format(**places), "--seq", "1 2"])
    assert environment.typed("train") == typed
    assert environment.words_of("train") == [word.format(**places) for word in words]
    assert environment.command().endswith(" --seq '1 2'")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted\n"),
        (ImportError("no libcuda"), EXIT_FAILURE, "error: an unexpected failure: ImportError: no libcuda"),
    ],
)
def test_what_happens_while_a_command_is_imported_is_told(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def imported(_: str) -> None:
        raise raised

    monkeypatch.setattr(frame.importlib, "import_module", imported)
    monkeypatch.setattr(signals, "_AT_FIRST", {})  # pytest keeps its own
    with pytest.raises(SystemExit) as ended:
        start("__main__", "train")
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(said)
    start("qlora_lowmem.train", "train")  # imported only: nothing runs


INTERRUPTED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
def add_arguments(parser): pass
def run(options): return print("it runs") or 0
"""


@pytest.mark.parametrize("number", [signal.SIG_DFL, signal.SIG_IGN])
def test_an_interrupt_while_a_command_is_imported(number: signal.Handlers, tmp_path: Path) -> None:
    """Ended at once; in the background of a shell, where interrupts are ignored, they are ignored here too."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    program = (
        "import sys, qlora_lowmem.commands.frame as frame\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import_module = frame.importlib.import_module\n"
        "frame.importlib.import_module = lambda _: import_module('interrupted')\n"
        "from qlora_lowmem.commands import start\n"
        "start(name='train')\n"
    )
    handled = f"import signal; signal.signal(signal.SIGINT, {int(number)}); import os, sys; "
    started = handled + f"os.execv(sys.executable, [sys.executable, '-c', {program!r}])"
    run = subprocess.run([sys.executable, "-c", started], capture_output=True, text=True, check=False)
    if number is signal.SIG_IGN:
        assert (run.returncode, run.stdout) == (0, "it runs\n"), run.stderr
    else:
        assert (run.returncode, run.stdout, run.stderr) == (EXIT_INTERRUPTED, "", "interrupted\n")


def test_the_exit_code_is_told_whatever_ran_before(tmp_path: Path) -> None:
    """CPython's `python -m` would die of the signal for an interrupt that was handled inside of an `exec`."""
    (tmp_path / "handled.py").write_text(
        "from qlora_lowmem.commands import frame, start\n"
        "def main():\n"
        "    exec('raise KeyboardInterrupt')\n"
        "frame.run_command = lambda _: frame.guarded(main)\n"
        "start(name='train')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-m", "handled"], env=env, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (EXIT_INTERRUPTED, "interrupted\n")
