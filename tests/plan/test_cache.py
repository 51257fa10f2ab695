"""Runs kept by content: what changes an answer changes its key, and damage is as good as nothing."""

import json
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.plan import kept_runs
from qlora_lowmem.plan.kept_runs import RunCache, Runs, Tally, run_key
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field, replace_fields

CARD = virtual_gpu.get_card("rtx-4050-laptop-6gb")
RECIPE = load_recipe(RECIPES / "optimised.yaml")
RUN = RecipeRun(MemoryProfile(CARD.name, "virtual", CARD.total_bytes, 1, {"steady": Peak(1, 2, 3)}), floor_bytes=4)


def test_what_was_put_is_got_and_nothing_else(tmp_path: Path) -> None:
    kept = RunCache(tmp_path)
    assert kept.get("ab12", dict) is None
    kept.put("ab12", {"a": [1, None]})
    assert RunCache(tmp_path).get("ab12", dict) == {"a": [1, None]}
    assert kept.get("ab13", dict) is None
    assert not list(tmp_path.rglob(".*")), "no scratch file stays"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a":1}', b"\xff\xfe"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    kept = RunCache(tmp_path)
    kept.put("ab12", {"a": 1})
    (tmp_path / "ab" / "ab12.json").write_bytes(damage)
    assert kept.get("ab12", dict) is None
    kept.put("ab12", {"a": 2})
    assert kept.get("ab12", dict) == {"a": 2}


def test_no_changed_bit_is_another_answer(tmp_path: Path) -> None:
    kept = RunCache(tmp_path)
    kept.put("ab12", {"a": 1})
    (path,) = (tmp_path / "ab").iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert kept.get("ab12", dict) is None
    path.write_bytes(whole)
    assert kept.get("ab12", dict) == {"a": 1}


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    kept = RunCache(tmp_path / "file" / "plan")
    kept.put("ab12", {"a": 1})
    kept.put("ab13", {"a": 1})
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_nothing_is_read_where_others_could_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_LOWMEM_CACHE", str(tmp_path))
    RunCache.of_this_user().put("ab12", {"a": 1})
    assert RunCache.of_this_user().get("ab12", dict) == {"a": 1}
    (tmp_path / "plan").chmod(0o777)
    assert RunCache.of_this_user().get("ab12", dict) is None
    assert "others may write there" in capsys.readouterr().err


def test_keys_differ_where_answers_may() -> None:
    keys = [
        run_key("run", RECIPE, CARD),
        run_key("attributed run", RECIPE, CARD),
        run_key("run", RECIPE, CARD.with_memory(CARD.total_bytes + 1)),
        run_key("run", RECIPE, virtual_gpu.get_card("rtx-3050-6gb")),
        run_key("run", replace_field(RECIPE, "max_seq_length", 1023), CARD),
        run_key("run", replace_field(RECIPE, "model", "granite-4.0-h-350m"), CARD),
    ]
    assert len(set(keys)) == len(keys)
    renamed = replace_fields(RECIPE, {"name": "other", "output_dir": "elsewhere", "save_steps": 7})
    assert run_key("run", renamed, CARD) == keys[0], "a name decides nothing"


def test_a_key_knows_versions_and_this_packages_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_key("run", RECIPE, CARD)
    with monkeypatch.context() as changed:
        changed.setattr(kept_runs, "versions", lambda: {"torch": "another"})
        assert run_key("run", RECIPE, CARD) != before
    with monkeypatch.context() as changed:
        changed.setattr(kept_runs, "_source_hash", lambda: "another")
        assert run_key("run", RECIPE, CARD) != before
    assert run_key("run", RECIPE, CARD) == before


def test_a_key_knows_the_code_of_every_function_that_a_run_is() -> None:
    """What the server is asked to call, and all that it imports, lies in rooms whose code is in the key."""
    functions: list[str] = []

    class Server:
        def submit(self, function: str, *_arguments: Any, **_options: Any) -> "Future[Any]":
            functions.append(function)
            return Future()

    asked = Runs(Server(), RunCache(None))  # type: ignore[arg-type]
    asked.submit(RECIPE, CARD, Tally(), "attributed run")
    asked.count_flops(RECIPE, CARD, Tally())
    assert len(functions) == 2
    modules = sorted({function.partition(":")[0] for function in functions} | {"qlora_lowmem.run.execute"})
    code = (
        f"import sys, {', '.join(modules)}\nprint(*(name for name in sys.modules if name.startswith('qlora_lowmem.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert set(modules) <= set(imported)
    assert not [name for name in imported if name.split(".")[1] in kept_runs._NOT_RUN]


def test_a_local_model_counts_by_its_content(tiny_hybrid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_hybrid / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    recipe = replace_field(RECIPE, "model", str(folder))
    before = run_key("run", recipe, CARD)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    assert run_key("run", recipe, CARD) != before


def test_a_run_survives_the_cache() -> None:
    again = msgspec.json.decode(msgspec.json.encode(RUN), type=RecipeRun)
    assert again == RUN


def submissions(monkeypatch: pytest.MonkeyPatch, run: RecipeRun) -> list[Recipe]:
    """The recipes that come to the server, each answered by `run`."""
    asked: list[Recipe] = []

    def submit(_server: Any, recipe: Recipe, _card: Any, **_options: Any) -> "Future[RecipeRun]":
        asked.append(recipe)
        future: Future[RecipeRun] = Future()
        future.set_result(run)
        return future

    monkeypatch.setattr(kept_runs, "submit_recipe", submit)
    return asked


def test_a_run_is_made_once_and_then_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = submissions(monkeypatch, RUN)
    first, tally = Runs(None, RunCache(tmp_path)), Tally()  # type: ignore[arg-type]
    assert first.submit(RECIPE, CARD, tally).result() == RUN
    assert first.submit(RECIPE, CARD, tally).result() == RUN
    assert (len(asked), tally) == (1, Tally(asked=1, cached=0))
    later = Tally()
    assert Runs(None, RunCache(tmp_path)).submit(RECIPE, CARD, later).result() == RUN  # type: ignore[arg-type]
    assert (len(asked), later) == (1, Tally(asked=1, cached=1))
    Runs(None, RunCache(None)).submit(RECIPE, CARD, Tally()).result()  # type: ignore[arg-type]
    assert len(asked) == 2, "without a cache it is run again"


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = submissions(monkeypatch, RecipeRun(None, failure="a bad moment"))
    for _ in range(2):
        Runs(None, RunCache(tmp_path)).submit(RECIPE, CARD, Tally()).result()  # type: ignore[arg-type]
    assert len(asked) == 2
