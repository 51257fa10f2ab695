"""`python -m qlora_lowmem.virtual_gpu`: what it prints, and the exit codes that scripts read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CARD = ("--card", "rtx-4050-laptop-6gb")


def test_a_plain_script_runs_and_its_peaks_are_told(cli, tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, torch\nx = torch.zeros(1 << 20, device='cuda')\nprint(sys.argv[1:])\nsys.exit(7)\n"
    )
    answer = cli(*CARD, "--json", "out.json", "--", sys.executable, "script.py", "--card", "x")
    assert answer.returncode == 7
    assert answer.stdout == "['--card', 'x']\n"
    assert (
        "virtual rtx-4050-laptop-6gb: peak allocated 0.004 GiB, reserved 0.020 GiB, device 0.459 GiB" in answer.stderr
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["peak_allocated_bytes"] == 4 * 2**20
    assert report["peak_reserved_bytes"] == 20 * 2**20
    assert report["peak_device_bytes"] == 470 * 2**20
    assert (report["device"], report["provenance"], report["exit_code"]) == ("rtx-4050-laptop-6gb", "virtual", 7)


def test_json_goes_to_standard_output(cli):
    answer = cli(*CARD, "--json", "-", "--", sys.executable, "-c", "import torch; torch.cuda.device_count()")
    assert answer.returncode == 0
    assert json.loads(answer.stdout)["peak_device_bytes"] == 0


@pytest.mark.parametrize(("ending", "code"), [("", 2), ("; sys.exit(7)", 7)])
def test_a_program_that_asks_for_no_card_is_no_success(cli, ending, code):
    """Which is what a program in an environment without a CUDA build of PyTorch looks like."""
    answer = cli(*CARD, "--json", "out.json", "--", sys.executable, "-c", f"import sys, json{ending}")
    assert answer.returncode == code
    assert "asked for no card" in answer.stderr
    assert "peak allocated" not in answer.stderr


def test_python_is_the_interpreter_that_runs_the_command_though_no_environment_is_activated(cli):
    program = "import subprocess, sys, torch; torch.cuda.device_count(); print(sys.executable, flush=True); "
    program += "subprocess.run(['python', '-c', 'import sys; print(sys.executable)'])"
    for name in ("python", "python3"):
        answer = cli(*CARD, "--", name, "-c", program, env=os.environ | {"PATH": "/usr/bin:/bin"})
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.split() == [sys.executable, str(Path(sys.executable).with_name("python"))]


def test_a_python_that_is_passed_over_is_named(cli, tmp_path):
    other = tmp_path / "other" / "python"
    other.parent.mkdir()
    other.symlink_to("/bin/true")
    path = f"{other.parent}:{os.environ['PATH']}"
    answer = cli(*CARD, "--", "python", "-c", "print(1)", env=os.environ | {"PATH": path})
    assert answer.stdout == "1\n"
    assert f"python is {sys.executable}, which runs this command, and not {other}" in answer.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits"),
            "NVIDIA GeForce RTX 4050 Laptop GPU, 6144\n",
        ),
        (
            ("--query-gpu", "memory.used, fan.speed", "--format", "csv", "-i", "0"),
            "memory.used [MiB], fan.speed\n0 MiB, [N/A]\n",
        ),
        (("--query-compute-apps=pid,used_memory", "--format=csv"), "pid, used_memory [MiB]\n"),
    ],
)
def test_programs_that_look_for_a_gpu_with_nvidia_smi_find_it(cli, asked, said):
    program = f"import subprocess; subprocess.run(['nvidia-smi', *{asked}], check=True)"
    answer = cli(*CARD, "--", sys.executable, "-c", program)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == said


def test_nvidia_smi_lists_every_card(cli):
    answer = cli(*CARD, "--count", "2", "--", "nvidia-smi", "-L")
    names = [line.partition(" (UUID: GPU-")[0] for line in answer.stdout.splitlines()]
    assert names == [f"GPU {index}: NVIDIA GeForce RTX 4050 Laptop GPU" for index in (0, 1)]
    assert "CUDA Version: 1" in cli(*CARD, "--", "nvidia-smi").stdout
    assert cli(*CARD, "--", "nvidia-smi", "-i", "7").returncode == 6


def test_the_memory_may_be_another(cli):
    program = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    answer = cli(*CARD, "--memory", "7.5GiB", "--", sys.executable, "-c", program)
    assert answer.stdout.strip() == str(15 * 2**29)


def test_a_signal_is_128_and_its_number(cli):
    answer = cli(*CARD, "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)")
    assert answer.returncode == 128 + signal.SIGTERM


def test_the_table_of_cards(cli):
    answer = cli("--list-cards")
    assert answer.returncode == 0
    assert "rtx-4050-laptop-6gb  6.00" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--card is missing"),
        (("--", "true"), "--card is missing"),
        (CARD, "the command to run is missing"),
        ((*CARD, "--"), "the command to run is missing"),
        (("--card", "rtx-9999", "--", "true"), "unknown card 'rtx-9999'"),
        ((*CARD, "--count", "0", "--", "true"), "1 to 16"),
        ((*CARD, "--count", "many", "--", "true"), "1 to 16"),
        ((*CARD, "--memory", "6 gigs", "--", "true"), "'6 gigs' is not a size"),
        ((*CARD, "--memory", "1MiB", "--", "true"), "the CUDA context alone takes"),
        ((*CARD, "--", "no-such-program"), "'no-such-program' is not found"),
        ((*CARD, "--json", "no/such/folder/out.json", "--", "true"), "no/such/folder"),
        ((*CARD, "--frobnicate", "--", "true"), "--frobnicate"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(cli, arguments, message):
    answer = cli(*arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_where_it_cannot_work_it_says_so_without_a_traceback(cli):
    answer = cli(*CARD, "--", "true", env=os.environ | {"CXX": "no-such-compiler"})
    assert answer.returncode == 2
    assert "no-such-compiler" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("built")
def test_an_interrupt_ends_the_program_too(tmp_path, number, code):
    pid_file = tmp_path / "pid"
    program = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", *CARD, "--", sys.executable, "-c", program]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "qlora_lowmem" not in stderr, "a traceback of ours"
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
