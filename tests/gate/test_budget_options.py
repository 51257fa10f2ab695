"""What of budgets and options is refused before anything runs, and that a project without budgets pays nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gate.user_project import FEW_PLUGINS, Run, run_pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ('"6 Gigs"', "limit='6 Gigs': '6 Gigs' has the unknown unit"),
        ('"6 GB", card="rtx-4050"', "card='rtx-4050': unknown card 'rtx-4050'. Did you mean rtx-4050-laptop-6gb"),
        ('"6 GB", card=5', "card=5: 5 is not a card's name"),
        ('"6 GB", card=None', "card=None: None is not a card's name"),
        ('"6 GB", card="1B"', "card='1B': card '1B': 1 bytes is not a card's memory"),
        ("6.5", "limit=6.5 is not a size"),
        ("True", "limit=True: True is not a size"),
        ("-1", "limit=-1: -1 is not a size"),
        ("limit=[1]", "limit=[1] is not a size"),
        ('"6 GB", limit="7 GB"', "given more than once"),
        ('"6 GB", of=[]', "of=[] is not one of allocated, reserved, device"),
        ("", "has no limit"),
        ('"6 GB", of="total"', "allocated, reserved, device"),
        ('"6 GB", crad="t4-16gb"', "unknown: crad"),
        ('"6 GB", launches="5 GB"', "launches='5 GB' is not a number of launches; write launches=5000"),
        ('"6 GB", launches=True', "launches=True is not a number of launches"),
        ('"6 GB", launches=-1', "launches=-1 is not a number of launches"),
    ],
)
def test_a_budget_that_cannot_be_read_stops_collection(
    pytester: pytest.Pytester, run_here: Callable[..., Run], marker: str, said: str
) -> None:
    (pytester.path / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.vram_budget({marker})\ndef test_it(): raise SystemExit('ran')\n"
    )
    run = run_here()
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


@pytest.mark.parametrize(
    "flags", [("--vram-report", "test_it.py/report"), ("--vram-baselines", "test_it.py", "--vram-record")]
)
def test_a_folder_in_which_nothing_can_be_written_in_the_end(
    pytester: pytest.Pytester, run_here: Callable[..., Run], flags: tuple[str, ...]
) -> None:
    (pytester.path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.vram_budget('6 GB')\ndef test_it(): raise SystemExit('ran')\n"
    )
    run = run_here(*flags)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"{flags[0]}: " in run.stderr
    assert "cannot be written" in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--vram-gpu", "-n", "2"), "measures one job at a time"),
        (("--vram-gpu", "--vram-card", "t4-16gb"), "give one"),
        (("--vram-record", "test_it.py"), "is a path"),
        (("--vram-budget", "1 Gigs"), "unknown unit"),
        (("-o", "vram_card=rtx"), "vram_card: unknown card 'rtx'"),
        (("--vram-card", "1B"), "--vram-card: card '1B': 1 bytes is not a card's memory"),
        (("-o", "vram_tolerance=-1"), "vram_tolerance: '-1' is not a size"),
        (("-o", "vram_tolerance_relative=half"), "is not a share"),
    ],
)
def test_options_that_cannot_work(
    pytester: pytest.Pytester, run_here: Callable[..., Run], flags: tuple[str, ...], said: str
) -> None:
    (pytester.path / "test_it.py").write_text("def test_it(): pass\n")
    run = run_here(*flags)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in run.stderr


@pytest.mark.parametrize("how", ["marker", "option"])
def test_reruns_are_refused(pytester: pytest.Pytester, run_here: Callable[..., Run], how: str) -> None:
    """As pytest-rerunfailures asks for them: by its marker, or by its option for all tests."""
    marker = "@pytest.mark.flaky(reruns=2)\n" if how == "marker" else ""
    (pytester.path / "test_it.py").write_text(
        f"import pytest\n{marker}@pytest.mark.vram_budget('1 GB')\ndef test_it(): pass\n"
    )
    (pytester.path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--reruns', type=int)\n"
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'flaky: rerun')\n"
    )
    run = run_here(*(("--reruns", "2") if how == "option" else ()))
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "reruns hide what it measures" in run.stderr


def test_corrupt_baselines_are_one_clear_error(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    folder = pytester.path / "peaks"
    folder.mkdir()
    (folder / "rtx-4050-laptop-6gb.json").write_text("{")
    (pytester.path / "test_it.py").write_text("import pytest\n@pytest.mark.vram_budget('1 GB')\ndef test_it(): pass\n")
    run = run_here("--vram-baselines=peaks", "--vram-record")
    assert run.returncode == 1
    assert "the baselines are not valid JSON" in run.stdout
    assert "Traceback" not in run.stdout
    assert (folder / "rtx-4050-laptop-6gb.json").read_text() == "{"


def test_a_budget_that_a_conftest_gives(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    """Markers that a project's own hook puts on its tests are read like any other."""
    (pytester.path / "test_it.py").write_text("def test_it(): pass\n")
    (pytester.path / "conftest.py").write_text(
        "import pytest\ndef pytest_collection_modifyitems(items):\n"
        "    items[0].add_marker(pytest.mark.vram_budget('1 Gigs'))\n"
    )
    run = run_here()
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_it.py::test_it: " in run.stderr
    assert "unknown unit" in run.stderr


def test_projects_without_budgets_pay_nothing() -> None:
    """Loading the plugin imports nothing heavy: neither torch, nor the rest of the gate, nor tables."""
    code = (
        "import pytest, sys; before = set(sys.modules); import qlora_lowmem.gate.plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {
        "qlora_lowmem",
        "qlora_lowmem.gate",
        "qlora_lowmem.gate.plugin",
    }


def test_nor_does_a_session_of_theirs(tmp_path: Path) -> None:
    """The gate is imported with the first test that it judges."""
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it():\n"
        "    found = [name for name in sys.modules if name == 'torch' or name.startswith('qlora_lowmem.')]\n"
        "    assert sorted(found) == ['qlora_lowmem.gate', 'qlora_lowmem.gate.plugin']\n"
    )
    run = run_pytest(tmp_path, *FEW_PLUGINS, "-q")
    assert "1 passed" in run.stdout, run.stdout + run.stderr
