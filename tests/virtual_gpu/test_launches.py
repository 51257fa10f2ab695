"""Kernels, copies and memsets, as the driver is asked for them."""

import json
import sys

import pytest

from qlora_lowmem.virtual_gpu import Launches, launches

GIVEN = """
import bitsandbytes.functional as bnb
square = torch.ones(64, 64, device="cuda")
half = square.bfloat16()
host = torch.ones(64, 64)
pinned = host.pin_memory()
empty = square.new_empty(0)
flags = torch.ones(64, 64, dtype=torch.bool, device="cuda")
row = torch.ones(64, device="cuda", requires_grad=True)
packed, state = bnb.quantize_4bit(half, quant_type="nf4")
image = torch.ones(1, 1, 8, 8, device="cuda")
weight = torch.ones(1, 1, 3, 3, device="cuda")
import ctypes
runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
address = ctypes.c_void_p(square.data_ptr())
"""

EXPECTED = {
    "square + square": (1, 0, 0),
    "[square + 1 for _ in range(7)]": (7, 0, 0),
    "square.add_(1); square.t(); square.view(-1); torch.empty_like(square)": (1, 0, 0),
    "empty + empty": (0, 0, 0),
    "square @ square": (1, 0, 0),  # one call of cuBLAS, whatever workspace and mode are set for it
    "half @ half": (1, 0, 0),
    "torch.bmm(square[None], square[None])": (1, 0, 0),
    "torch.nn.functional.linear(half, half, half[0])": (1, 0, 0),  # cuBLASLt adds the bias
    "torch.zeros(8, device='cuda')": (1, 0, 0),  # a kernel that fills, in PyTorch
    "square.cuda()": (0, 0, 0),
    "host.cuda()": (0, 1, 0),
    "square.copy_(host)": (0, 1, 0),
    "pinned.copy_(square)": (0, 1, 0),
    "square.cpu()": (0, 1, 0),
    "square.clone()": (0, 1, 0),  # contiguous: the driver copies
    "square.t().contiguous()": (1, 0, 0),
    "square.bfloat16()": (1, 0, 0),
    "square.sum().item()": (1, 1, 0),
    "bnb.dequantize_4bit(packed, state)": (1, 0, 0),
    "(row * 2).backward(row.detach())": (3, 0, 0),  # product, its gradient, and that added to the one there
    "torch.nn.functional.conv2d(image, weight)": (1, 0, 0),  # one plan of cuDNN's
    "runtime.cudaMemsetAsync(address, 0, ctypes.c_size_t(512), None)": (0, 0, 1),
    "runtime.cudaMemsetAsync(address, 0, ctypes.c_size_t(0), None)": (0, 0, 0),
    "torch.cuda.synchronize(); torch.cuda.Event().record()": (0, 0, 0),
}


def test_a_statement_launches_what_pytorch_launches_for_it(job):
    found = job("launches_of", given=GIVEN, statements=list(EXPECTED)).value
    assert {statement: tuple(counts) for statement, counts in found.items()} == EXPECTED


def test_other_processes_count_on_the_machine_and_not_here(job):
    found = job("launches_of_a_child_and_a_fork").value
    assert found == {"kernels": [1, 1 + 3], "exit code of the fork": [0]}


def test_the_report_has_all_of_a_program(cli, tmp_path):
    program = "import torch, os; t = torch.ones(4, device='cuda'); (t + t).cpu(); os._exit(0)"
    answer = cli("--card", "t4-16gb", "--json", "report.json", "--", sys.executable, "-c", program)
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["launches"] == {"kernels": 2, "copies": 1, "memsets": 0}


def test_what_a_tuner_times_is_not_counted(cli, tmp_path):
    """Beside it, all is: the number of its repetitions depends on time."""
    program = """
import torch
from torch._inductor.runtime.benchmarking import benchmarker
from triton.testing import do_bench
one = torch.ones(4, device='cuda')
do_bench(lambda: one + one, warmup=1, rep=1)
benchmarker.benchmark_gpu(lambda: one + one)
one + one
"""
    answer = cli("--card", "t4-16gb", "--json", "report.json", "--", sys.executable, "-c", program)
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["launches"] == {"kernels": 2, "copies": 0, "memsets": 0}


def test_nobody_counts_off_a_virtual_machine():
    assert launches.of_this_process() is None
    assert launches.of_all_processes() is None


def test_launches_add_up():
    both = Launches(3, 2, 1) + Launches(1, 1, 1) * 2
    assert both == Launches(5, 4, 3)
    assert both.total == 12
    assert both - Launches(5, 4, 3) == Launches()


@pytest.mark.parametrize("count", [1, 2])
def test_a_job_of_a_server_counts_from_nothing(job, count):
    """Jobs are forks of one process, which has submitted nothing."""
    statement = "; ".join(["square + square"] * count)
    given = "square = torch.ones(2, 2, device='cuda')"
    result = job("launches_of", given=given, statements=[statement])
    assert result.value == {statement: [count, 0, 0]}
    assert result.report.launches == Launches(kernels=1 + 2 * count)
