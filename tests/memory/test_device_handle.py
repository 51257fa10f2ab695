"""Which card is asked: a job that sees one of several reads the memory of its own."""

import json
import subprocess
import sys
from collections.abc import Callable

import pynvml
import pytest

from qlora_lowmem.memory.device import device_handle
from qlora_lowmem.virtual_gpu import get_card

PROGRAM = """
import json, os, subprocess, sys, torch
from qlora_lowmem.memory.recorder import Recorder
if len(sys.argv) == 1:  # another program fills the first card; the job, in a process of its own, sees the second
    other = torch.empty(512 << 20, dtype=torch.uint8, device="cuda:0")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["SEES"]}
    sys.exit(subprocess.run([sys.executable, "-c", os.environ["PROGRAM"], "job"], env=env).returncode)
recorder = Recorder()
with recorder.phase("load"):
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
profile = recorder.profile()
print(json.dumps([profile.outside_allocator_bytes, profile.peak.reserved]))
"""


@pytest.mark.parametrize("sees", ["0", "1"])
def test_a_job_reads_the_card_that_it_sees(
    command: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch, sees: str
) -> None:
    monkeypatch.setenv("SEES", sees)
    monkeypatch.setenv("PROGRAM", PROGRAM)
    run = command("virtual_gpu", "--card", "rtx-4050-laptop-6gb", "--count", "2", "--", sys.executable, "-c", PROGRAM)
    assert run.returncode == 0, run.stderr
    outside, reserved = json.loads(run.stdout)
    context = get_card("rtx-4050-laptop-6gb").context_bytes
    assert outside == context, "the CUDA context of this process, and nothing of the other"
    assert reserved == 66 << 20


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("", "card 1"),
        ("1,0", "card 0"),
        ("GPU-aa,GPU-bb", "card 1"),
        ("GPU-bb55,GPU-aa", "card 0"),
        ("0,MIG-7", "MIG-7"),
    ],
)
def test_the_second_device_of_cuda_is_which_of_nvmls(monkeypatch: pytest.MonkeyPatch, visible: str, found: str) -> None:
    uuids = {"card 0": "GPU-aa11-22", "card 1": "GPU-bb55-66"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(uuids))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", "card {}".format)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", uuids.__getitem__)
    assert device_handle(1) == found
