"""Programs of other people's making, run as they are: PyTorch's, Accelerate's, transformers' loops; several cards."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).with_name("programs")
MIB = 2**20
# One compiler process is enough for two small kernels; starting more takes longer than they do.
ENVIRONMENT = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture
def program(cli, tmp_path):
    """Runs a command on cards through the command line; returns the report that it wrote."""

    def run_program(*command: str, card: str = "a100-40gb", count: int = 1) -> dict:
        options = ("--card", card, "--count", str(count), "--json", "report.json")
        answer = cli(*options, "--", *command, env=ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "warm")})
        assert answer.returncode == 0, answer.stderr[-3000:]
        assert not (tmp_path / "warm").exists(), "what other runs compiled would change the peak"
        return json.loads((tmp_path / "report.json").read_text())

    return run_program


def script(name: str) -> tuple[str, ...]:
    return (sys.executable, "-W", "ignore", str(PROGRAMS / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "notices"),
    [
        ("cnn.py", ["dnn_workspaces"]),
        ("compiled.py", []),
        ("linear_algebra.py", ["dnn_workspaces", "solver_workspaces", "sparse_workspaces", "fft_workspaces"]),
    ],
)
def test_a_program_runs_unmodified(program, name, notices):
    report = program(*script(name))
    assert report["peak_allocated_bytes"] > 0
    assert report["complete"]
    assert report["missing_functions"] == []
    assert report["notices"] == notices


@pytest.mark.slow
def test_programs_of_transformers_run_unmodified(program):
    """Its evaluation and its training, one after the other: importing it takes longer than both."""
    both = [str(PROGRAMS / name) for name in ("evaluate.py", "llama.py")]
    one_by_one = f"import runpy\nfor path in {both}:\n    runpy.run_path(path, run_name='__main__')"
    report = program(sys.executable, "-W", "ignore", "-c", one_by_one)
    assert report["peak_allocated_bytes"] > 0
    assert report["complete"]
    assert report["missing_functions"] == []
    assert report["notices"] == []


@pytest.mark.slow
def test_accelerate_launches_a_plain_script(program):
    report = program(sys.executable, "-m", "accelerate.commands.launch", str(PROGRAMS / "accelerated.py"))
    assert report["complete"]
    assert report["missing_functions"] == []


@pytest.mark.slow
def test_data_parallel_ranks_have_a_card_each(program):
    """Per rank: fp32 weights, gradients, the buckets that are reduced, AdamW's two states and a temporary."""
    report = program(
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script("ddp.py")[-1:], count=2
    )
    assert report["missing_functions"] == []
    assert report["notices"] == ["nccl_buffers"]
    assert report["complete"]
    first, second = report["devices"]
    weights = 4 * (1024 * 1024 + 1024) * 4
    for device in (first, second):
        assert device["peak_allocated_bytes"] == 6 * weights + 2 * 8_519_680  # and cuBLAS's workspace of each thread
        assert device["peak_device_bytes"] == device["peak_reserved_bytes"] + report["context_bytes"]


@pytest.mark.slow
def test_sharded_ranks_hold_their_part(program):
    """Spawned by the program, not by torchrun; what a rank may hold, it asserts itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    report = program(*script("fsdp2.py"), str(port), count=2)
    assert report["missing_functions"] == []
    assert report["notices"] == ["nccl_buffers"]
    first, second = report["devices"]
    assert first["peak_allocated_bytes"] == second["peak_allocated_bytes"] > 0


def test_a_card_describes_itself_as_a_row_of_the_table(cli, laptop):
    import tomllib

    printed = cli("--card", laptop.name, "--", sys.executable, "-m", "qlora_lowmem.virtual_gpu", "--print-card")
    assert printed.returncode == 0, printed.stderr
    row = tomllib.loads(printed.stdout)["card"][laptop.name]
    sources = row.pop("sources")
    assert row.pop("architecture") == "ada"
    assert row.pop("usable_bytes") == laptop.total_bytes  # no desktop on a virtual machine
    assert row == {name: getattr(laptop, name) for name in row}
    assert set(sources) == {"total_bytes", "usable_bytes", "context_bytes", "sm_count"}
    assert all("measured by --print-card (20" in text for text in sources.values())
