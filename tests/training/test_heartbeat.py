"""Whose file `memory.json` is: a trial on a virtual card leaves that of a run that trains there alone."""

import dataclasses
import os
import time
from pathlib import Path

import psutil
import pytest

from qlora_lowmem.memory.profile import LiveMemory, read_live, write_live
from qlora_lowmem.recipe import Recipe, Run
from qlora_lowmem.training.progress import Heartbeat
from qlora_lowmem.virtual_gpu.cards import CARD_VARIABLE

CARD = "rtx-4050-laptop-6gb"


def another(folder: Path, **changes: object) -> LiveMemory:
    """The file of the process that started this one."""
    parent = psutil.Process(os.getppid())
    live = LiveMemory(parent.pid, parent.create_time(), time.time(), "other", "cuda", phase="training")
    live = dataclasses.replace(live, **changes)
    write_live(folder, live)
    return live


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    monkeypatch.setenv(CARD_VARIABLE, CARD)
    return Heartbeat(Recipe(name="trial", run=Run(device="virtual", output_dir=str(tmp_path))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "cpu"},
        {"phase": "ended", "outcome": "done"},
        {"device": "virtual"},
    ],
    ids=["that trains", "that trains on a CPU", "that has trained", "that is a trial too and runs"],
)
def test_another_runs_file_stays(trial: Heartbeat, tmp_path: Path, changes: dict[str, str]) -> None:
    live = another(tmp_path, **changes)
    with trial:
        assert read_live(tmp_path) == live
    assert read_live(tmp_path) == live


@pytest.mark.parametrize("changes", [{"phase": "ended", "outcome": "done"}, {"started": 1.0}], ids=["ended", "killed"])
def test_a_trial_follows_a_trial(trial: Heartbeat, tmp_path: Path, changes: dict[str, str]) -> None:
    another(tmp_path, device="virtual", **changes)
    with trial:
        assert read_live(tmp_path).recipe == "trial"
    assert (read_live(tmp_path).phase, read_live(tmp_path).outcome) == ("ended", "done")


def test_a_run_that_begins_beside_a_trial_takes_the_file(trial: Heartbeat, tmp_path: Path) -> None:
    with trial:
        live = another(tmp_path)
    assert read_live(tmp_path) == live


def test_a_run_that_trains_writes_in_any_case(tmp_path: Path) -> None:
    another(tmp_path)
    with Heartbeat(Recipe(name="real", run=Run(device="cpu", output_dir=str(tmp_path)))):
        assert read_live(tmp_path).recipe == "real"
