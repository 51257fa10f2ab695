"""From a command line to pairs, and their answers to the screen; runs are a formula."""

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from plan.fakes import FakeRuns
from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands import plan as command
from qlora_lowmem.commands.frame import parser_of, run_command
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, EXIT_USAGE
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe.io import load_recipe

main = partial(run_command, "plan")
ALL = [card.name for card in virtual_gpu.all_cards()]
TWO = ["--card", "t4-16gb", "rtx-3050-6gb"]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No server and no runs; the numbers of workers that were asked for."""
    asked: list[int] = []

    @contextlib.contextmanager
    def server(workers: int) -> Iterator[None]:
        asked.append(workers)
        yield

    monkeypatch.setattr(command, "recipe_server", server)
    monkeypatch.setattr(command, "Runs", lambda *_: FakeRuns())
    return asked


def cards(monkeypatch: pytest.MonkeyPatch, *asked: str) -> list[str]:
    own = dataclasses.replace(virtual_gpu.get_card("t4-16gb"), name="own", title="A GPU")
    monkeypatch.setattr(command, "card_of_this_machine", lambda: own)
    return [card.name for card in command._cards(parser_of("plan", "plan").parse_args(list(asked)))]


def test_all_cards_are_every_one_once_beside_what_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cards(monkeypatch, "--card", "all") == ALL
    assert cards(monkeypatch, "--card", "all", "--gpu") == [*ALL, "own"]
    assert cards(monkeypatch, "--card", "all", "t4-16gb") == ALL
    assert cards(monkeypatch, "--card", "t4-16gb", "all", "all")[0] == "t4-16gb"
    assert sorted(cards(monkeypatch, "--card", "t4-16gb", "all")) == sorted(ALL)


@pytest.mark.parametrize(
    ("asked", "name", "usable", "said"),
    [
        (
            ["--card", "12GB"],
            "12gb",
            12 * 10**9,
            "12gb: a generic card, of 11.176 GiB, 10.876 GiB usable; an assumption",
        ),
        (["--memory", "12 GB"], "12gb", 12 * 10**9, "12gb: a generic card"),
        (["--card", "rtx-5070", "--memory", "12GB"], "12gb", 12 * 10**9, "12gb: a generic card"),
        (["--memory", str(8 * 2**30)], "8589934592b", 8 * 2**30, "a generic card, of 8.000 GiB"),
        (
            ["--card", "rtx-3060-12gb", "--memory", "8GiB"],
            "rtx-3060-12gb@8gib",
            8 * 2**30,
            "like rtx-3060-12gb, of 8.0",
        ),
    ],
    ids=str,
)
def test_a_card_that_is_not_in_the_table(
    asked: list[str], name: str, usable: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (card,) = command._cards(parser_of("plan", "plan").parse_args(asked))
    assert (card.name, card.total_bytes) == (name, usable)
    assert abs(card.usable_bytes - usable + 322_122_547) < 10**6, "0.3 GiB for a desktop"
    assert card == virtual_gpu.get_card(card.name), "so its runs, and the recipe that is written, find it by its name"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("flag", ["--seq", "--max-seq-length"])
def test_the_length_is_asked_as_here_or_as_in_the_other_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(RECIPES / "optimised.yaml"), "--card", "t4-16gb", flag, "512"]) == EXIT_OK
    assert "optimised at 512 tokens on t4-16gb: fits" in capsys.readouterr().out


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ([], "tiles, host, 40,000 tokens; longest sequence 40,000 tokens (no longer one was tried"),
        (["--limit", "131072"], "tiles, host, 40,000 tokens; longest sequence 65,792 tokens (66,048 does not"),
    ],
)
def test_the_limit_follows_what_is_wanted(limit: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "llama-3.2-3b", "--card", "rtx-3060-laptop-6gb", "--seq", "40000", *limit]
    assert main(asked) == EXIT_OK
    assert f"Proposed: {said}" in capsys.readouterr().out


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(
    "said", [["--attention", "eager"], ["--loss", "full"], ["--expandable-segments", "false"], ["--lean", "false"]]
)
def test_a_field_on_the_command_line_empties_no_search(said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "granite-4.0-350m", "--card", "t4-16gb", *said]) == EXIT_OK
    assert "Proposed: " in capsys.readouterr().out


@pytest.mark.usefixtures("workers")
def test_a_wanted_length_is_written_with_its_margin_and_the_longest_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine.yaml"
    asked = ["--model", "granite-4.0-h-1b", "--card", "rtx-3060-laptop-6gb", "--write", str(target)]
    assert main([*asked, "--seq", "2000"]) == EXIT_OK
    assert load_recipe(target).batch.max_seq_length == 2000
    room = "That leaves 2.082 GiB of room; the longest sequence that fits is 4,096 tokens."
    assert room in " ".join(target.read_text().replace("#", " ").split())
    out = capsys.readouterr().out
    assert "granite-4.0-h-1b on rtx-3060-laptop-6gb: fits at 2,000 tokens, with 2.082 GiB of room. (virtual)" in out
    assert "Proposed: checkpointing, 2,000 tokens; longest sequence 4,096 tokens (4,352 does not fit)." in out
    assert main([*asked, "--force"]) == EXIT_OK
    assert load_recipe(target).batch.max_seq_length == 4096


@pytest.mark.usefixtures("workers")
def test_one_bad_model_of_a_sweep_is_a_row_and_the_others_are_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    summary = tmp_path / "summary.json"
    asked = ["--model", "granite-4.0-350m", "nosuch", *TWO, "--json", str(summary)]
    assert main(asked) == EXIT_USAGE
    printed = capsys.readouterr()
    assert "error" not in printed.err
    *table, reason = printed.out.splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:5]] for line in table[2:]] == [
        ["granite-4.0-350m", "t4-16gb", "2,048", "yes"],
        ["granite-4.0-350m", "rtx-3050-6gb", "2,048", "yes"],
        ["nosuch", "t4-16gb", "2,048", "failed"],
        ["nosuch", "rtx-3050-6gb", "2,048", "failed"],
    ]
    assert reason.startswith("nosuch on t4-16gb, rtx-3050-6gb failed: base.model: 'nosuch' is no folder")
    content = json.loads(summary.read_text())
    assert [case["bad_input"] for case in content["cases"]] == [False, False, True, True]
    assert not content["fits"]


@pytest.mark.usefixtures("workers")
def test_a_model_that_is_too_short_for_the_wanted_length_is_a_row_too(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "smollm2-135m-instruct", "granite-4.0-h-350m", "--card", "t4-16gb", "--seq", "16384"]
    assert main(asked) == EXIT_USAGE
    table = capsys.readouterr().out
    assert "smollm2-135m-instruct on t4-16gb failed: --seq: smollm2-135m-instruct was made for 8192 tokens" in table
    assert "| granite-4.0-h-350m" in table


@pytest.mark.usefixtures("workers")
def test_a_full_sweep_shows_each_pairs_screen_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "baseline.yaml")
    asked = ["--config", recipe, "--model", "granite-4.0-h-1b", "nosuch", *TWO]
    assert main(asked) == EXIT_USAGE
    table = capsys.readouterr().out
    assert "Largest batch" not in table
    assert main([*asked, "--full"]) == EXIT_USAGE
    printed = capsys.readouterr().out
    assert printed.startswith(table.rstrip("\n").splitlines()[0])
    for card in ("t4-16gb", "rtx-3050-6gb"):
        assert f"\nbaseline, granite-4.0-h-1b at 2,048 tokens on {card}: " in printed
    assert printed.count("Largest batch:") == 2
    assert printed.count("one change, each one run") == 2
    assert main(["--config", recipe, *TWO]) == EXIT_DOES_NOT_FIT


def test_as_many_workers_as_cores_may_be_used(workers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {2, 5, 7})
    assert main(["--model", "granite-4.0-350m", "--card", "t4-16gb"]) == EXIT_OK
    assert workers == [3]


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("own_data", [False, True])
def test_what_is_to_be_run_next_is_what_was_planned(
    own_data: bool, tmp_path: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights have no tokenizer, so a person's own data stay out."""
    asked, target = tmp_path / "asked.yaml", tmp_path / "the best.yaml"
    fields = {"model": "granite-4.0-h-1b"} | ({"data": str(conversations)} if own_data else {})
    asked.write_text(load_recipe(RECIPES / "optimised.yaml", fields).to_yaml())
    assert main(["--config", str(asked), "--card", "t4-16gb", "--write", str(target)]) == EXIT_OK
    train, whole = (line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()[-2:])
    start = ["python", "-m", "qlora_lowmem.train", "--config", str(target)]
    assert shlex.split(train.removeprefix("Train: ")) == start + ([] if own_data else ["--data", "my.jsonl"])
    planned = ["--device", "virtual", "--weights", "random"] + (["--data", "synthetic"] if own_data else [])
    assert shlex.split(whole) == start + planned


@pytest.mark.parametrize("given", [True, False], ids=["a recipe", "a model"])
@pytest.mark.usefixtures("workers")
def test_the_first_verdict_is_said_before_any_other_run_is_waited_for(
    given: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    class Awaited(Future[RecipeRun]):
        def result(self, timeout: float | None = None) -> RecipeRun:
            said.append(capsys.readouterr().out)
            return super().result(timeout)

    class Runs(FakeRuns):
        def submit(self, *asked: Any, **options: Any) -> "Future[RecipeRun]":
            awaited = Awaited()
            awaited.set_result(super().submit(*asked, **options).result())
            return awaited

    monkeypatch.setattr(command, "Runs", lambda *_: Runs())
    asked = ["--config", str(RECIPES / "optimised.yaml")] if given else ["--model", "granite-4.0-h-1b"]
    assert main([*asked, "--card", "rtx-3060-laptop-6gb"]) == EXIT_OK
    first, second, *_ = said
    assert first == ""
    if given:
        assert second.startswith("optimised at 1,024 tokens on rtx-3060-laptop-6gb: fits, with 3.035 GiB of room.")
        assert len(second.splitlines()) == 2
    else:
        verdict = "  too much  fastest: exact; nothing is computed twice"
        assert second.splitlines()[1:] == [verdict]
    whole = "".join(said) + capsys.readouterr().out
    asked_again = FakeRuns()
    monkeypatch.setattr(command, "Runs", lambda *_: asked_again)
    main([*asked, "--card", "rtx-3060-laptop-6gb"])
    assert _timeless(whole) == _timeless(capsys.readouterr().out), "nothing is said twice, nothing is left out"


def _timeless(text: str) -> str:
    return re.sub(r"in \d+ s", "", text)
