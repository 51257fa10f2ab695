"""Bad inputs, every command's: each ends with exit code 2 (pytest's own is 4) and one message, and leaves nothing.

    python -m pytest bench/test_bad_inputs.py

Each is a process: a fork of one that has imported what commands import. Of near-duplicates some are drawn by a seed,
which the table names; `--every-input` tries them all.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from bad_inputs import Case, Outcome, all_cases, drawn, outcome_of
from forked_commands import run_forked, start_server
from helpers import ROOT
from matrix_recipes import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_page, markdown_table, write_result
from tiny_chat import write_tiny_chat

pytestmark = pytest.mark.bad_inputs

SEED, ENOUGH, LEAST = 15, 150, 1000
ALL = all_cases()
COMMANDS = list(dict.fromkeys(case.command for case in ALL))
KINDS = list(dict.fromkeys(case.kind for case in ALL))
# What commands import, so that a fork need not.
_IMPORTED = (
    *("qlora_lowmem.run.before_after", "qlora_lowmem.run.merge", "qlora_lowmem.results.page"),
    *("pyarrow.parquet", "pytest"),
)


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
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """Those that are tried."""
    return ALL if request.config.getoption("every_input") else drawn(ALL, SEED, ENOUGH)


@pytest.fixture(scope="module")
def as_it_was(good: Path) -> dict[str, str]:
    """What lay there before the first of them, and where commands write unless they are told otherwise."""
    return _content(good)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    cases: list[Case],
    good: Path,
    as_it_was: dict[str, str],
    results_folder: Path,
    printed_at_the_end: list[str],
) -> Iterator[dict[Case, "Future[Outcome]"]]:
    """Those of the commands that are asked about, two at a time, beside those that only wait.

    The table is written if all were tried.
    """
    del as_it_was
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = [call.params["command"] for call in calls if "command" in call.params]
    in_turn = [case for command in asked for case in cases if case.command == command]
    with ThreadPoolExecutor(2) as busy, ThreadPoolExecutor(8) as waiting:
        found = {case: (waiting if case.waits else busy).submit(outcome_of, case, good) for case in in_turn}
        yield found
        for future in found.values():
            future.cancel()  # of a test run that was stopped or asked for less
    ended = [future.result() for future in found.values() if not future.cancelled()]
    if len(ended) == len(cases):
        printed_at_the_end.append(_write(results_folder, ended))


def _content(good: Path) -> dict[str, str]:
    paths = [*good.rglob("*"), *(ROOT / "outputs").glob("*")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in paths}


def _write(folder: Path, ended: list[Outcome]) -> str:
    table = _table(ended)
    short = sum(bool(each.short) for each in ended)
    text = (
        f"{len(ended):,} of {len(ALL):,} bad inputs (near-duplicates drawn with seed {SEED}); {short} fell short: "
        "another exit code than 2 (pytest's own for wrong options is 4), no message or several, a traceback, something "
        "left behind, or a message that does not name what is wrong. Each is a process."
    )
    record = provenance_record("cpu", "measured")
    rows = [asdict(each) | {"said": each.said if each.short else ""} for each in ended]
    content = {"environment": record, "seed": SEED, "of": len(ALL), "cases": rows}
    write_result(folder, "bad-inputs", content, markdown_page("Bad inputs", [text, table], record), rows)
    return table


def _table(ended: list[Outcome]) -> str:
    rows = []
    for name in [*COMMANDS, "all"]:
        of_it = [each for each in ended if name in (each.command, "all")]
        codes = Counter(str(each.exit_code) for each in of_it)
        by_kind = [str(sum(each.kind == kind for each in of_it) or "-") for kind in KINDS]
        said = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
        rows.append([name, *by_kind, str(len(of_it)), said, str(sum(bool(each.short) for each in of_it))])
    return markdown_table(["command", *KINDS, "all", "by exit code", "fell short"], rows)


def test_they_are_many_and_each_is_another(cases: list[Case]) -> None:
    assert len(cases) >= LEAST
    twice = [each for each, count in Counter((case.command, case.what) for case in ALL).items() if count > 1]
    assert not twice


def test_none_of_the_kinds_commands_subjects_and_faults_is_left_out(cases: list[Case]) -> None:
    there = {(case.kind, side) for case in cases for side in case.sides}
    assert there == {(case.kind, side) for case in ALL for side in case.sides}


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_inputs(command: str, outcomes: dict[Case, "Future[Outcome]"]) -> None:
    ended = [future.result() for case, future in outcomes.items() if case.command == command]
    said = [f"{each.kind}, {each.what}: {each.short}\n{each.said}" for each in ended if each.short]
    assert not said, f"{len(said)} of {len(ended)} of {command} did not end as promised\n\n" + "\n\n".join(said)


def test_what_was_good_is_as_it_was(
    outcomes: dict[Case, "Future[Outcome]"], good: Path, as_it_was: dict[str, str]
) -> None:
    assert all(future.result() for future in outcomes.values())
    assert _content(good) == as_it_was
