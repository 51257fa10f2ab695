"""Bad inputs, every command's: each ends with exit code 2 (pytest's own is 4) and one message, and leaves nothing.

    python -m pytest bench/test_bad_inputs.py

Each is a process: a fork of one that has imported what commands import. A table by command is printed at the end.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import yaml

from bad_inputs import all_cases, fault_of
from forked_commands import run_forked, start_server
from matrix_recipes import RECIPES
from qlora_lowmem.results.tables import markdown_table
from tiny_chat import write_tiny_chat

pytestmark = pytest.mark.bad_inputs

CASES = all_cases()
COMMANDS = list(dict.fromkeys(case.command for case in CASES))
LEAST = 600
# What commands import, so that a fork need not.
_IMPORTED = ("qlora_lowmem.run.before_after", "qlora_lowmem.run.merge", "qlora_lowmem.results.page", "pyarrow.parquet")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, samples, a model, a run, results: each as it should be."""
    folder = tmp_path_factory.mktemp("good")
    write_tiny_chat(folder / "model")
    for name, count in (("data", 8), ("held-out", 2)):
        lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    recipe["base"]["model"] = str(folder / "model")
    recipe["lora"] |= {"lora_r": 2, "lora_alpha": 4}
    recipe["schedule"]["max_steps"] = 1
    recipe["data"]["data"] = "data.jsonl"
    (folder / "good.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "good.txt").write_text("peft==0.21.0\n")
    (folder / "bad.txt").write_text("peft==0.21.1\n")
    (folder / "empty").mkdir()
    (folder / "results").mkdir()
    start_server(*_IMPORTED)
    words = ("train", "--config", str(folder / "good.yaml"), "--quiet", "--output-dir", str(folder / "run"))
    words += ("--json", str(folder / "results" / "train.json"))
    done = run_forked("qlora_lowmem", words, os.environ, 300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def faulty(printed_at_the_end: list[str]) -> Iterator[dict[str, int]]:
    """By command: how many did not end as promised. What was tried is printed at the end."""
    found: dict[str, int] = {}
    yield found
    counts = Counter(case.command for case in CASES)
    rows = [[command, str(counts[command]), str(number)] for command, number in found.items()]
    rows.append(["all", str(sum(counts[command] for command in found)), str(sum(found.values()))])
    headings = ["command", "bad inputs", "that did not end as promised"]
    printed_at_the_end.append(markdown_table(headings, rows, text_columns=1))


def test_they_are_many_and_each_is_another() -> None:
    assert len(CASES) >= LEAST
    twice = [each for each, count in Counter((case.command, case.what) for case in CASES).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_inputs(command: str, good: Path, faulty: dict[str, int]) -> None:
    cases = [case for case in CASES if case.command == command]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(partial(fault_of, good=good), cases), strict=True))
    said = [f"{case.what}: {fault}" for case, fault in found.items() if fault is not None]
    faulty[command] = len(said)
    assert not said, f"{len(said)} of {command} did not end as promised\n\n" + "\n\n".join(said)
