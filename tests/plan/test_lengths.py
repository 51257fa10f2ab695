"""Peaks by sequence length, all in one worker."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.commands import lengths
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.results.kinds.lengths import Length
from qlora_lowmem.results.tables import gib

Command = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = ("--config", str(RECIPES / "optimised.yaml"), "--weights", "random")


def test_five_lengths_of_a_tiny_model(command: Command, tiny_hybrid: Path, tmp_path: Path) -> None:
    lengths = ["512", "64", "128", "256", "1024", "64"]
    run = command(
        "lengths", *CONFIG, "--model", str(tiny_hybrid), "--lengths", *lengths, "--json", "-", "--table", str(tmp_path)
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [row["tokens"] for row in found["cases"]] == [64, 128, 256, 512, 1024]
    peaks = [row["peak_allocated_bytes"] for row in found["cases"]]
    assert peaks == sorted(set(peaks)), "a longer sequence takes more"
    assert found["peak_allocated_bytes"] == peaks[-1]
    assert all(row["fits"] for row in found["cases"])
    floors = [row["floor_bytes"] for row in found["cases"]]
    per_token = (floors[1] - floors[0]) // 64
    assert per_token > 0, "two residual tensors"
    assert floors == [floors[0] + (tokens - 64) * per_token for tokens in (64, 128, 256, 512, 1024)]
    page = (tmp_path / "lengths.md").read_text(encoding="utf-8")
    assert f"| {gib(floors[2])} | {peaks[2] / floors[2]:.2f} |" in re.sub(" +", " ", page)
    written = json.loads((tmp_path / "lengths.json").read_text(encoding="utf-8"))
    assert written["cases"] == found["cases"]
    assert written["usable_bytes"] == found["usable_bytes"]
    # The same length by the training command: the same bytes, whichever worker ran it.
    alone = command("train", *CONFIG, "--model", str(tiny_hybrid), "--device", "virtual", "--max-seq-length", "256",
                    "--gradient-accumulation-steps", "2", "--max-steps", "2", "--json", "-")  # fmt: skip
    trained = json.loads(alone.stdout)
    assert [trained[name] for name in ("peak_allocated_bytes", "floor_bytes")] == [peaks[2], floors[2]]


def test_a_length_that_cannot_be_trained_is_refused(command: Command) -> None:
    run = command("lengths", *CONFIG, "--lengths", "1024", "1")
    assert run.returncode == 2
    assert "--lengths: 1 is too few; give 2 to" in run.stderr


@pytest.mark.parametrize(
    ("longest", "asked", "code"),
    [(8192, [], 0), (4096, [], 0), (256, [], 3), (8192, ["--lengths", "8192"], 0), (4096, ["--lengths", "8192"], 3)],
)
def test_the_exit_code_says_whether_it_fits(
    longest: int, asked: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default lengths go past the card's end: there it is enough that one fits."""
    seen: list[int] = []

    def measure(_: object, tokens: list[int], *__: object) -> list[Length]:
        seen.extend(tokens)
        return [Length("r", count, count <= longest, Peak(1, 2, 3), 4) for count in tokens]

    monkeypatch.setattr(lengths, "measure_lengths", measure)
    assert run_command("lengths", [*CONFIG, *asked]) == code
    assert seen == ([8192] if asked else [512, 1024, 2048, 4096, 8192])
