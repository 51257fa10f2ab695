"""The vram_budget marker in a user's project, on the virtual card."""

import json
import pickle
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from gate.user_project import FEW_PLUGINS, TEST, Run, run_pytest
from helpers import ROOT
from qlora_lowmem import virtual_gpu

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("built")]

# One kernel makes the tensor; a fixture and a process of the test's own count, too.
LAUNCHES = """\
import subprocess, sys
import pytest, torch


@pytest.fixture
def tensor():
    return torch.ones(1, device="cuda")


@pytest.mark.vram_budget("64 MiB", card="t4-16gb", launches=6)
@pytest.mark.parametrize("count", [5, 6])
def test_kernels(tensor, count):
    for _ in range(count):
        tensor.add_(1)


@pytest.mark.vram_budget("64 MiB", card="t4-16gb", launches=3)
def test_a_copy_and_a_process(tensor):
    tensor.cpu()
    subprocess.run([sys.executable, "-c", "import torch; torch.ones(1, device='cuda').add_(1)"], check=True)
"""

# Every way in which a test can end, with what it prints.
MANY = """\
import pytest, torch

pytestmark = pytest.mark.vram_budget("64 MiB", card="t4-16gb")


@pytest.fixture
def block():
    print("made by a fixture")
    return torch.empty(2**20, device="cuda")


def test_within(block):
    print("on", torch.cuda.get_device_name(0))
    torch.cuda.reset_peak_memory_stats()


def test_at_the_limit():
    torch.empty(2**26, dtype=torch.uint8, device="cuda")


def test_one_byte_over():
    torch.empty(2**26 + 1, dtype=torch.uint8, device="cuda")


def test_a_peak_that_is_reset():
    torch.empty(2**27, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()


def test_fails():
    print("before it fails")
    assert torch.cuda.device_count() == 2, "a plain failure"


@pytest.mark.skip(reason="not today")
def test_skipped():
    pass


def test_skips_itself():
    pytest.skip("nothing to do")


@pytest.mark.xfail(reason="too much", strict=True)
def test_expected_to_be_over():
    torch.empty(2**27, dtype=torch.uint8, device="cuda")


def test_out_of_memory():
    kept = torch.empty(2**34 - 2**30, dtype=torch.uint8, device="cuda")
    torch.empty(2**33, dtype=torch.uint8, device="cuda")


def test_dies():
    import os
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("count", [1, 2])
def test_parameters(count, request, tmp_path):
    assert request.config.getoption("--own") == "given"
    assert torch.empty(count, device="cuda").numel() == count


class TestInAClass:
    def test_method(self):
        torch.empty(1, device="cuda")
"""


# A process of its own, without PyTorch, holds memory of the card for a quarter of a second.
WITH_A_CHILD = """\
import os, subprocess, sys
import pytest

pytestmark = pytest.mark.vram_budget("1 GB")
(RUNTIME,) = [entry for entry in os.environ["LD_PRELOAD"].split() if "libcudart" in entry]
TAKE = f"import ctypes; ctypes.CDLL({RUNTIME!r}).cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(2**20));"


def test_child():
    subprocess.run([sys.executable, "-c", TAKE + "import time; time.sleep(0.25)"], check=True)


def test_child_on_the_host():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.25)"], check=True)
"""


def test_fresh_folder_with_pip_install(tmp_path: Path) -> None:
    """The package installed by pip, a user's test: passes, and fails when the model grows by a layer."""
    site, project = tmp_path / "site", tmp_path / "project"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"pip cannot build a wheel here: {installed.stderr.strip().splitlines()[-1]}")
    project.mkdir()
    (project / "test_model.py").write_text(TEST)
    env = {"PYTHONPATH": str(site), "QLORA_LOWMEM_ENTRY_POINT": "1"}

    passing = run_pytest(project, **env)
    assert passing.returncode == 0, passing.stdout + passing.stderr
    assert "qlora-lowmem" in passing.stdout  # pytest lists it among its plugins

    # A conftest.py that names the plugin as well, as this project's own does, means the same plugin.
    (project / "conftest.py").write_text('pytest_plugins = ["qlora_lowmem.gate.plugin"]\n')
    grown = run_pytest(project, LAYERS="5", **env)
    assert grown.returncode == 1
    failure = grown.stdout
    assert "GPU memory over budget: test_model.py::test_step" in failure
    assert re.search(r"allocated 816\.7 MiB, limit 700 MiB: 116\.7 MiB over", failure), failure
    assert "since it last passed (656.6 MiB allocated)" in failure
    assert re.search(r"\+128\.\d MiB +layers\.4 +new", failure), failure
    assert re.search(r"optimizer state .* test_model\.py:\d+ test_step", failure), failure
    assert re.search(r"weights and buffers +layers\.\d", failure), failure
    assert "base weights" not in failure  # whose they are, nobody said
    assert len(failure[failure.index("GPU memory over") : failure.index("kept:")].splitlines()) < 25


def test_everything_of_the_inner_test_comes_through(
    pytester: pytest.Pytester, run_here: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = pytester.path
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "test_many.py").write_text(MANY)
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--own')\n")
    run = run_here("-rA", "--own", "given", "--junitxml=junit.xml", "--vram-report=report")
    lines = re.findall(r"^(PASSED|FAILED|XFAIL|ERROR) test_many\.py::(\S+)", run.stdout, re.MULTILINE)
    ends = {name: how for how, name in lines}
    assert ends == {
        "test_within": "PASSED",
        "test_at_the_limit": "PASSED",
        "test_one_byte_over": "FAILED",
        "test_a_peak_that_is_reset": "FAILED",
        "test_fails": "FAILED",
        "test_expected_to_be_over": "XFAIL",
        "test_out_of_memory": "FAILED",
        "test_dies": "FAILED",
        "test_parameters[1]": "PASSED",
        "test_parameters[2]": "PASSED",
        "TestInAClass::test_method": "PASSED",
    }, run.stdout + run.stderr
    for said in (
        "made by a fixture",
        "on Tesla T4",
        "before it fails",
        "a plain failure",
        "not today",
        "nothing to do",
        "512 B over",  # blocks are multiples of 512 bytes
        "CUDA out of memory",
        "the process of this test did not finish",
        "::error file=test_many.py,title=GPU memory%3A OVER BUDGET::GPU memory over budget",
    ):
        assert said in run.stdout, said
    cases = {case.get("name"): case for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}
    properties = {p.get("name"): p.get("value") for p in cases["test_one_byte_over"].iter("property")}
    assert properties["vram_allocated_bytes"] == str(2**26 + 512)
    assert properties["vram_limit_bytes"] == str(2**26)
    assert properties["vram_verdict"] == "OVER BUDGET"
    report = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"gate.json", "trend.json", "summary.md", "chart.svg"} <= report
    trend = json.loads((tmp_path / "report" / "trend.json").read_text())
    assert {"name", "unit", "value", "extra"} == trend[0].keys()
    assert "xychart-beta" in (tmp_path / "summary.md").read_text()


def test_defaults_from_the_ini_file_and_the_command_line(
    pytester: pytest.Pytester, run_here: Callable[..., Run]
) -> None:
    tmp_path = pytester.path
    (tmp_path / "pytest.ini").write_text("[pytest]\nvram_budget = 1 MiB\nvram_card = t4-16gb\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest, torch\n@pytest.mark.vram_budget\ndef test_it():\n    torch.empty(2**21, device='cuda')\n"
    )
    by_ini = run_here()
    assert "limit 1 MiB" in by_ini.stdout
    assert "on t4-16gb" in by_ini.stdout
    by_flags = run_here("--vram-budget", "7MiB", "--vram-card", "rtx-4050-laptop-6gb")
    assert "limit 7MiB" in by_flags.stdout
    assert "on rtx-4050-laptop-6gb" in by_flags.stdout


def test_record_compare_and_refuse(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    """Baselines of a passing run are recorded; a byte more is then a regression; a failing run writes nothing."""
    tmp_path = pytester.path
    test = tmp_path / "test_it.py"
    body = (
        "import pytest, torch\n@pytest.mark.vram_budget('1 GB')\ndef test_it():\n    torch.empty({}, device='cuda')\n"
    )
    test.write_text(body.format("2**20"))
    flags = ("--vram-baselines", "peaks")
    recorded = run_here(*flags, "--vram-record")
    assert recorded.returncode == 0, recorded.stdout
    file = tmp_path / "peaks" / "rtx-4050-laptop-6gb.json"
    assert f"recorded in {file}" in recorded.stdout
    before = file.read_bytes()
    assert str(tmp_path) not in file.read_text()
    assert run_here(*flags).returncode == 0

    test.write_text(body.format("2**20 + 1"))
    regressed = run_here(*flags)
    assert regressed.returncode == 1
    assert "REGRESSED" in regressed.stdout
    assert "(+512 bytes)" in regressed.stdout
    kept = re.search(r"kept of this run: (\S+\.json), (\S+\.pickle)", regressed.stdout)
    assert kept is not None, regressed.stdout
    snapshot = pickle.loads(Path(kept[2]).read_bytes())
    assert snapshot["segments"], "what torch's memory viewer opens"
    assert any(event["action"] == "alloc" for event in snapshot["device_traces"][0])
    assert run_here(*flags, "--vram-report-only").returncode == 0
    assert file.read_bytes() == before

    test.write_text(body.format("2**18"))
    improved = run_here(*flags)
    assert improved.returncode == 0
    assert "IMPROVED" in improved.stdout
    assert "pytest --vram-record=" in improved.stdout

    test.write_text(body.format("2**18") + "def test_other(): assert False\n")
    failing = run_here(*flags, "--vram-record")
    assert "no baseline was written: the run did not pass" in failing.stdout
    assert file.read_bytes() == before
    named = run_here(*flags, "test_it.py::test_it", "--vram-record=test_it")
    assert named.returncode == 0
    assert file.read_bytes() != before
    unknown = run_here(*flags, "test_it.py::test_it", "--vram-record=nothing")
    assert unknown.returncode == 1
    assert "no case of the name nothing ran" in unknown.stdout


def test_xdist_gives_the_same_bytes(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    tmp_path = pytester.path
    (tmp_path / "test_it.py").write_text(
        # xdist's own processes have no need of torch.
        "import pytest\n@pytest.mark.parametrize('n', range(2))\n@pytest.mark.vram_budget('1 GB')\n"
        "def test_it(n):\n    import torch\n    torch.empty(2**20 * (n + 1), device='cuda')\n"
    )
    alone = run_here("--vram-baselines=peaks", "--vram-record")
    together = run_pytest(tmp_path, *FEW_PLUGINS, "--vram-baselines=other", "--vram-record", "-n", "2")
    assert (alone.returncode, together.returncode) == (0, 0), together.stdout
    name = "rtx-4050-laptop-6gb.json"
    assert (tmp_path / "peaks" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_ten_runs_give_the_same_bytes(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    """The whole record, attribution included, from ten sessions of pytest."""
    (pytester.path / "test_model.py").write_text(TEST)
    files = set()
    for number in range(10):
        assert run_here(f"--vram-baselines=peaks-{number}", "--vram-record").returncode == 0
        files.add((pytester.path / f"peaks-{number}" / "rtx-4050-laptop-6gb.json").read_bytes())
    assert len(files) == 1


CACHES = """
import os
import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir
SEEN = [os.environ["TORCHINDUCTOR_CACHE_DIR"]]
def new():
    assert cache_dir() not in SEEN and not os.listdir(cache_dir())
    SEEN.append(cache_dir())
    open(cache_dir() + "/compiled", "w").close()
@pytest.mark.vram_budget("64 MiB")
def test_first_cache():
    new()
@pytest.mark.vram_budget("64 MiB")
def test_second_cache():
    new()
def test_without_a_budget():
    assert cache_dir() == SEEN[0] and not os.path.exists(SEEN[1])
"""


def test_on_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """`--vram-gpu` measures in the process itself, and fails where another of the test's processes used the GPU.

    The machine is virtual here: for pytest it is the real thing, without the account of a virtual one.
    """
    limits = MANY[MANY.index("def test_at_the_limit") : MANY.index("def test_fails")]
    marker = '@pytest.mark.vram_budget("64 MiB")\n'
    (tmp_path / "test_model.py").write_text(TEST)
    (tmp_path / "test_limits.py").write_text("import pytest, torch\n" + limits.replace("def test", f"{marker}def test"))
    (tmp_path / "test_child.py").write_text(WITH_A_CHILD)
    (tmp_path / "test_cache.py").write_text(CACHES)
    (tmp_path / "conftest.py").write_text(
        "from qlora_lowmem.virtual_gpu import together\ntogether.begin = lambda: False\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "qlora_lowmem.gate.plugin", *FEW_PLUGINS, "--vram-gpu", "-rA"]
    with (tmp_path / "output").open("w") as output:
        card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
        virtual_gpu.run(command, card, cwd=tmp_path, stdout=output, timeout=120)
    text = (tmp_path / "output").read_text()
    ends = {name: how for how, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\S+)", text, re.MULTILINE)}
    assert ends == {
        "test_step": "PASSED",
        "test_at_the_limit": "PASSED",
        "test_one_byte_over": "FAILED",
        "test_a_peak_that_is_reset": "FAILED",
        "test_child": "FAILED",
        "test_child_on_the_host": "PASSED",
        "test_first_cache": "PASSED",
        "test_second_cache": "PASSED",
        "test_without_a_budget": "PASSED",
    }, text
    assert "512 B over" in text
    assert "NOT COUNTED: python" in text
    assert "64.0 MiB over" in text


def test_all_constants_of_4bit_weights_are_named(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    (pytester.path / "test_it.py").write_text(
        "import bitsandbytes as bnb, pytest, torch\n@pytest.mark.vram_budget('1 GB')\ndef test_it():\n"
        "    layer = bnb.nn.Linear4bit(1024, 4096, bias=False, compute_dtype=torch.bfloat16).cuda()\n"
        "    x = torch.ones(4096, 1024, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "    layer(x).sum().backward()\n"
    )
    recorded = run_here("--vram-baselines", "peaks", "--vram-record")
    assert recorded.returncode == 0, recorded.stdout
    (case,) = json.loads((pytester.path / "peaks" / "rtx-4050-laptop-6gb.json").read_text())["cases"].values()
    blocks = 1024 * 4096 // 64
    # a byte a block, in fp32 a scale for 256 of these, an offset, and the tables of 16 and 256 values
    assert case["kinds"]["quantisation"] == blocks + 4 * (blocks // 256 + 1 + 16 + 256)
    assert case["kinds"]["weights_4bit"] == 1024 * 4096 // 2


def test_a_test_that_launches_too_much_fails(pytester: pytest.Pytester, run_here: Callable[..., Run]) -> None:
    (pytester.path / "test_launches.py").write_text(LAUNCHES)
    run = run_here("-rA", "--vram-report=report")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Launches over budget: test_launches.py::test_kernels[6]" in run.stdout
    assert "7 kernels, copies and memsets, limit 6: 1 over" in run.stdout
    assert "4 kernels, copies and memsets, limit 3: 1 over" in run.stdout
    assert "PASSED test_launches.py::test_kernels[5]" in run.stdout
    cases = json.loads((pytester.path / "report" / "gate.json").read_text())["cases"]
    assert [(case["record"]["launches"], case["fails"]) for case in cases] == [(4, True), (6, False), (7, True)]
