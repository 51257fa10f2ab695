"""The section of training runs: the peaks by phase of what `train --json` wrote."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.results.page import sections_of
from results.examples import CARD, trained

Command = Callable[..., subprocess.CompletedProcess[str]]


def written(folder: Path, name: str, **changes: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(trained("mine", **changes)))
    return path


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    """Those of one name by their files; the line is what a job can use there."""
    ran_out = {"phase": "steady", "message": "CUDA out of memory.", "checkpoint": None}
    paths = [written(tmp_path, "a.json"), written(tmp_path, "b.json", fits=False, failure=ran_out)]
    (section,) = sections_of(paths).sections
    (chart,) = section.charts
    assert [found.caption for found in chart.tables] == [
        f"Peaks of mine ({stem}) in GiB by phase" for stem in ("a", "b")
    ]
    usable = virtual_gpu.get_card(CARD).usable_bytes
    assert [[cell.value for cell in row[1:5]] for row in chart.tables[0].rows] == [
        [2**30 + n, 2**31, 3 * 2**30 + n, usable] for n in (0, 1)
    ]
    verdicts = [[row[-1].text for row in found.rows] for found in chart.tables]
    assert verdicts == [["within budget"] * 2, ["within budget", "out of memory"]]
    assert [[[cell.text for cell in row] for row in found.rows] for found in section.tables] == [
        [["mine (a)", "steady", "1.000", "0.500", "2.00"], ["mine (b)", "steady", "1.000", "-", "-"]],
        [["mine (b)", "steady", "CUDA out of memory."]],
    ]


def test_a_card_that_is_not_known_has_all_it_has(tmp_path: Path) -> None:
    (section,) = sections_of([written(tmp_path, "a.json", device="NVIDIA Something", recipe={"name": None})]).sections
    (found,) = section.charts[0].tables
    assert found.caption == "Peaks of a in GiB by phase"
    assert {row[4].value for row in found.rows} == {6 * 2**30}


def test_a_run_of_the_command_is_read(command: Command, tiny_hybrid: Path, tmp_path: Path) -> None:
    path = tmp_path / "trained.json"
    run = command(
        "train", "--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--weights", "random",
        "--device", "virtual", "--max-seq-length", "64", "--max-steps", "2", "--json", str(path),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (section,) = sections_of([path]).sections
    content = json.loads(path.read_text())
    phases = content["phases"]
    rows = section.charts[0].tables[0].rows
    assert [row[0].text for row in rows] == [phase["name"] for phase in phases]
    assert [row[1].value for row in rows] == [phase["allocated"] for phase in phases]
    (beside,) = section.tables[0].rows
    assert [cell.value for cell in beside[2:4]] == [content["peak_allocated_bytes"], content["floor_bytes"]]
