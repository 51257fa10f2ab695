"""A small run, killed in seven ways and started again each time: it ends as if undisturbed.

Losses are logged as means over two steps and samples are held out, so that what lies between two log lines and between
an evaluation and its checkpoint is seen too.

`bench/test_chaos.py` is the same with the demo's real model and 30 events.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from chaos.disk import SmallDisk
from chaos.driver import Chaos, starter
from chaos.events import KINDS, Event
from chaos.process import PRELOADED, context, logged
from helpers import RECIPES

STEPS = 12
FULL_AT_START = Event("disk full", 0, 0.0, 0.0)
EVENTS = [FULL_AT_START, *(Event(kind, 0 if kind == "SIGKILL" else 1, 0.02, 0.4) for kind in KINDS)]


@pytest.mark.parametrize("name", PRELOADED)
def test_what_is_imported_beforehand_is_there(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


@pytest.mark.slow
def test_killed_in_every_way_it_ends_as_if_undisturbed(
    tiny_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of so small a model wait for each other more than they work
    made = context()

    def arguments(output: Path, name: str) -> list[str]:
        recipe = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--weights", "random"]
        size = ["--max-seq-length", "32", "--gradient-accumulation-steps", "2", "--lora-dropout", "0.1"]
        steps = ["--max-steps", str(STEPS), "--save-steps", "1", "--save-total-limit", "3"]
        steps += ["--logging-steps", "2", "--eval-fraction", "0.4", "--eval-steps", "2"]
        where = ["--device", "cpu", "--output-dir", str(output), "--json", str(tmp_path / f"{name}.json")]
        return [*recipe, *size, *steps, *where]

    whole = tmp_path / "whole"
    undisturbed = starter(made, arguments(whole, "undisturbed"))(tmp_path / "whole.txt")
    assert undisturbed.wait(300) == 0, undisturbed.said
    with SmallDisk(tmp_path / "disk", 64 * 2**20) as disk:
        struck = list(Chaos(starter(made, arguments(disk.folder / "run", "struck")), disk, tmp_path).strike(EVENTS))
        assert [each.kind for each in struck] == [each.kind for each in EVENTS]
        for each in struck:
            assert each.resumed_from == each.expected, each
        assert [each.exit_code for each in struck] == [2, -9, 143, 130, 2, -9, -9]
        assert "make room on that disk" in struck[0].said.lower(), "no fault of ours"
        assert all("damaged" in note for each, note in zip(struck, notes(tmp_path), strict=False) if each.detail)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (disk.folder / "run" / name).read_bytes() == (whole / name).read_bytes()
        lines, expected = logged(disk.folder / "run"), logged(whole)
    assert [line["step"] for line in lines if "loss" in line] == list(range(2, STEPS + 1, 2))
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
        assert [line.get(key) for line in lines] == [line.get(key) for line in expected]
    summaries = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("undisturbed", "struck")]
    for key in ("losses", "evaluations", "steps", "tokens"):
        assert summaries[1][key] == summaries[0][key]


def notes(folder: Path) -> list[str]:
    """What each start after the first said."""
    return [(folder / f"start-{number}.txt").read_text() for number in range(2, len(EVENTS) + 2)]
