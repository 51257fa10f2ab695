"""Two paths of a newcomer, walked and timed: from clone to "it fits, and here is why"; a model learns a small skill.

The first runs the commands of README from `git clone` on, in a folder, an environment and a cache that are new;
it installs 6 GB. The second trains the demo and asks it what it has learnt, from conversations and from pairs of texts.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from matrix_recipes import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

pytestmark = pytest.mark.newcomer

ROOT = Path(__file__).parents[1]
_FIRST_BLOCK = re.compile(r"^```sh\n(git clone.*?)^```", re.MULTILINE | re.DOTALL)
MINUTES = 60
PROMPT = "Why is the sky blue?"


def machine() -> str:
    """The processor, and how many of its cores this process may use."""
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def test_from_clone_to_it_fits(tmp_path: Path, results_folder: Path) -> None:
    found = _FIRST_BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    commands = found[1].strip().splitlines()
    assert len(commands) == 3, commands
    # One shell, for `cd` and `activate` to last; after each command its exit code and the time.
    mark = "--- done"
    lines = ["set -e"]
    for command in commands:
        lines += [command.replace("URL", shlex.quote(str(ROOT))), f'echo "{mark} $(date +%s.%N)"']
    hidden = ("QLORA_LOWMEM_", "PYTHON", "VIRTUAL_ENV", "TOX_", "PIP_CONSTRAINT")
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    started = time.time()
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    ends = [float(end) for end in re.findall(rf"^{mark} (\S+)$", done.stdout, re.MULTILINE)]
    seconds = [end - start for start, end in zip([started, *ends], ends, strict=False)]
    answer = done.stdout.rsplit(mark, 2)[1].split("\n", 1)[1]
    assert "fits" in answer
    rows = [{"command": command, "seconds": round(taken, 1)} for command, taken in zip(commands, seconds, strict=True)]
    record = provenance_record("cpu", "measured")
    cells = [[f"`{row['command']}`", f"{row['seconds']:.0f}"] for row in rows]
    cells.append(["all", f"{sum(seconds):.0f}"])
    table = markdown_table(["", "seconds"], cells)
    markdown = (
        '# From clone to "it fits, and here is why"\n\nThe commands of README\'s first block, in seconds, without a '
        f"GPU, on {machine()}; caches of answers and builds empty.\n\n{table}\n\n"
        "What the last one said (figures: *virtual*):\n\n"
        f"```text\n{answer.strip()}\n```\n\n{provenance_lines(record)}\n"
    )
    write_result(results_folder, "newcomer", {"environment": record, "cases": rows, "answer": answer}, markdown, rows)


def learned(folder: Path, data: Path) -> tuple[list[float], dict[str, Any], list[float]]:
    """(losses, what `generate` says, seconds of training and of asking) of the demo's recipe on `data`."""
    said, summary = folder.with_suffix(".said.json"), folder.with_suffix(".summary.json")
    train = ["train", "--config", str(RECIPES / "demo.yaml"), "--data", str(data), "--output-dir", str(folder)]
    train += ["--json", str(summary)]
    ask = ["generate", "--run", str(folder), "--prompt", PROMPT, "--data", str(RECIPES / "demo-held-out.jsonl")]
    ask += ["--json", str(said)]
    seconds = []
    for module, *arguments in (train, ask):
        started = time.perf_counter()
        command = [sys.executable, "-m", f"qlora_lowmem.{module}", *arguments, "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds.append(time.perf_counter() - started)
    losses: list[float] = json.loads(summary.read_text(encoding="utf-8"))["losses"]
    return losses, json.loads(said.read_text(encoding="utf-8")), seconds


def as_pairs(conversations: Path, to: Path) -> Path:
    """The same questions and answers as `prompt` and `completion`."""
    rows = [json.loads(line)["messages"] for line in conversations.read_text(encoding="utf-8").splitlines()]
    pairs = ({"prompt": asked["content"], "completion": said["content"]} for asked, said in rows)
    to.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return to


def test_the_demo_learns_a_skill(tmp_path: Path, results_folder: Path) -> None:
    """In under ten minutes on two cores, both commands; the same from pairs of texts, to the word."""
    losses, content, seconds = learned(tmp_path / "demo", RECIPES / "demo.jsonl")
    pairs = as_pairs(RECIPES / "demo.jsonl", tmp_path / "pairs.jsonl")
    from_pairs, content_from_pairs, _ = learned(tmp_path / "pairs", pairs)
    (answer,), held_out = content["answers"], content["held_out"]
    rows = [
        {
            "steps": len(losses),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "held_out_before": held_out["before"]["loss"],
            "held_out_after": held_out["after"]["loss"],
            "train_seconds": round(seconds[0], 1),
            "generate_seconds": round(seconds[1], 1),
        }
    ]
    record = provenance_record("cpu", "measured")
    cells = [
        ["loss of the first step, of the last", f"{losses[0]:.3f}", f"{losses[-1]:.3f}"],
        ["loss on samples held out", f"{held_out['before']['loss']:.3f}", f"{held_out['after']['loss']:.3f}"],
    ]
    table, took = markdown_table(["", "before", "after"], cells), [f"{each:.0f} s" for each in seconds]
    markdown = (
        f"# The demo, before and after\n\nSmolLM2-135M-Instruct in 4 bits, {len(losses)} steps, on {machine()}: "
        f"training {took[0]}, asking {took[1]}.\n\n{table}\n\nAsked: {PROMPT}\n\n- Before: {answer['before']!r}\n"
        f"- After: {answer['after']!r}\n- After the same as `prompt` and `completion`: "
        f"{content_from_pairs['answers'][0]['after']!r}\n\n{provenance_lines(record)}\n"
    )
    write_result(results_folder, "demo", {"environment": record, "cases": rows, "answer": answer}, markdown, rows)
    assert from_pairs == pytest.approx(losses, rel=1e-3)
    assert content_from_pairs["answers"] == content["answers"]
    assert losses[-1] < 0.5 * losses[0]
    assert held_out["after"]["loss"] < 0.6 * held_out["before"]["loss"]
    assert answer["after"].startswith("Short answer:")
    assert not answer["before"].startswith("Short answer:")
    assert sum(seconds) < 10 * MINUTES
