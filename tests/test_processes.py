"""Several processes, started by torchrun or accelerate: the same losses as one with the same batch, one voice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked_commands import run_forked, start_server
from helpers import RECIPES, ROOT
from tiny_chat import write_tiny_chat

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
FSDP2 = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "bench/distributed/fsdp2.yaml"),
]


def run(command: list[str]) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def trained(
    folder: Path, model: Path, processes: int, accumulation: int, *more: str, torchrun: bool = False
) -> tuple[dict[str, Any], str]:
    """The summary and what was printed of a run with `processes * accumulation` samples a step."""
    summary = folder.with_suffix(".json")
    flags = [
        "--config",
        str(RECIPES / "demo.yaml"),
        "--model",
        str(model),
        "--max-seq-length",
        "64",
        "--max-steps",
        "3",
    ]
    flags += ["--save-steps", "2", "--batch-size", "1", "--gradient-accumulation-steps", str(accumulation)]
    flags += [*more, "--output-dir", str(folder), "--json", str(summary)]
    if torchrun:
        said = run([*TORCHRUN, str(processes), "-m", "qlora_lowmem.train", *flags])
    else:
        start_server()
        ranks = ("programs.forked_ranks", (str(processes), "qlora_lowmem.train", *flags))
        done = run_forked(*ranks, ENVIRONMENT, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stderr
    return json.loads(summary.read_text(encoding="utf-8")), said


@pytest.mark.slow
def test_more_processes_with_the_same_batch_learn_the_same(tmp_path: Path) -> None:
    model = write_tiny_chat(tmp_path / "model")
    alone, _ = trained(tmp_path / "one", model, 1, 4)
    together, said = trained(tmp_path / "two", model, 2, 2, torchrun=True)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert len(together["losses"]) == 3
    assert said.count("adapter saved to") == 1, "one process speaks for all"
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]


def _stopped_after_step_2(folder: Path) -> None:
    """Make a run of four steps look as if it had been stopped half way."""
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.slow
def test_several_processes_log_the_same_when_they_go_on_between_two_log_lines(tmp_path: Path) -> None:
    """A line is the mean over four steps and both processes, each of which has its own sum of the first two steps."""
    model, folder = write_tiny_chat(tmp_path / "model"), tmp_path / "run"
    options = ["--max-steps", "4", "--logging-steps", "4", "--save-total-limit", "2"]
    expected, _ = trained(folder, model, 2, 1, *options)
    sums = json.loads((folder / "checkpoint-2" / "totals.json").read_text())["losses"]
    assert len(set(sums)) == 2, "else the test would see nothing"
    _stopped_after_step_2(folder)
    found, said = trained(folder, model, 2, 1, *options)
    assert "resuming from" in said
    assert found["losses"] == expected["losses"]
    assert found["tokens"] == expected["tokens"]
    _stopped_after_step_2(folder)
    alone, said = trained(folder, model, 1, 2, *options)
    assert "the number of processes was 2 and is now 1" in said
    assert alone["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("built")
def test_fsdp2_shards_four_bit_weights_over_virtual_cards(tiny_hybrid: Path, tmp_path: Path) -> None:
    summaries = {}
    for storage in ("uint8", "bf16"):
        target = tmp_path / f"{storage}.json"
        virtual = [
            sys.executable,
            "-m",
            "qlora_lowmem.virtual_gpu",
            "--card",
            "rtx-4050-laptop-6gb",
            "--count",
            "2",
            "--",
        ]
        recipe = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--quant-storage", storage]
        size = ["--device", "cuda", "--adapter-dtype", "bf16", "--max-seq-length", "64", "--json", str(target)]
        size += ["--output-dir", str(tmp_path / storage), "--gradient-accumulation-steps", "1"]
        run([*virtual, *FSDP2, "-m", "qlora_lowmem.train", *recipe, *size])
        summaries[storage] = json.loads(target.read_text(encoding="utf-8"))
    for content in summaries.values():
        assert [rank["provenance"] for rank in content["ranks"]] == ["virtual", "virtual"]
        assert content["ranks"][0] == content["ranks"][1], "every card holds as much"
        assert content["ranks"][0]["outside_allocator_bytes"] > 0, "the CUDA context counts"
    whole, sharded = (summaries[storage]["floor_bytes"] for storage in ("uint8", "bf16"))
    assert sharded < whole, "4-bit weights are shared out only where their storage is a float"
