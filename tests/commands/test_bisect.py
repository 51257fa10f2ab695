"""The bisection between two environments, with measurements made up."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.commands import bisect as command
from qlora_lowmem.commands.bisect import Found, bisect, overlaid, read_constraints
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe.io import load_recipe

GOOD = dict.fromkeys("abcdefgh", "1") | {"same": "1"}
BAD = dict.fromkeys("abcdefgh", "2") | {"same": "1", "only-here": "1"}


class Measure:
    """Peaks by what each package adds at its bad version; None where a combination does not run."""

    def __init__(self, **costs: int) -> None:
        self.costs = costs
        self.asked: list[frozenset[str]] = []
        self.broken: list[frozenset[str]] = []

    def __call__(self, versions: Mapping[str, str]) -> int | None:
        changed = frozenset(name for name, version in versions.items() if version == "2")
        assert changed not in self.asked, "the same environment twice"
        self.asked.append(changed)
        if changed in self.broken:
            return None
        return 100 + sum(self.costs.get(name, 0) for name in changed)


@pytest.mark.parametrize("culprit", list("abcdefgh"))
def test_names_the_package(culprit: str) -> None:
    measure = Measure(**{culprit: 50})
    found = bisect(GOOD, BAD, measure)
    assert found.packages == (culprit,)
    assert (found.good, found.bad, found.jump) == (100, 150, 50)
    assert found.versions == {culprit: ("1", "2")}
    assert len(measure.asked) <= 2 + 3
    assert f"{culprit} 1 -> 2: +50 B" in found.render()


def test_the_larger_of_two() -> None:
    found = bisect(GOOD, BAD, Measure(b=10, f=50))
    assert (found.packages, found.jump) == (("f",), 50)
    assert "the other +10 B come from other packages" in found.render()


def test_steps_around_what_does_not_run() -> None:
    measure = Measure(f=50)
    measure.broken = [frozenset("abcd")]
    assert bisect(GOOD, BAD, measure).packages == ("f",)
    measure = Measure(d=50)
    measure.broken = [frozenset("abcd")]  # so that d alone cannot be told from e
    found = bisect(GOOD, BAD, measure)
    assert found.packages == ("d", "e")
    assert "one of these, or both together" in found.render()


@pytest.mark.parametrize(
    ("measure", "said"),
    [(Measure(), "needs no more than --good"), (Measure(a=-5), "Swap them"), (lambda _: None, "does not run")],
)
def test_ends_that_cannot_be_bisected(measure: Measure, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        bisect(GOOD, BAD, measure)


def test_nothing_differs() -> None:
    with pytest.raises(UsageError, match="nothing to bisect"):
        bisect(GOOD, GOOD, Measure())


def test_constraints(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(
        "# a comment\nTorch_Vision==1.2\n-r other.txt\nrange>=3\nx==2  # why\ny == 3 ; python_version > '3'\n"
    )
    assert read_constraints(file) == {"torch-vision": "1.2", "x": "2", "y": "3"}
    file.write_text("range>=3\n")
    with pytest.raises(UsageError, match="pip freeze"):
        read_constraints(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_constraints(tmp_path / "none.txt")


def test_overlays_are_made_once_and_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def pip(command: list[str], env: Mapping[str, str]) -> object:
        assert Path(env["TMPDIR"]).is_dir()
        calls.append(command)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(command, "run_child", pip)
    monkeypatch.setattr(command, "installed", lambda name: {"same": "1"}.get(name))
    monkeypatch.setenv("PYTHONPATH", "/before")
    for _ in range(2):
        environment = overlaid({"package": "2", "same": "1"}, tmp_path)
        assert environment["PYTHONPATH"] == f"{tmp_path / 'package-2' / 'site-packages'}:/before"
    assert len(calls) == 1
    assert calls[0][-1] == "package==2"
    assert "--no-deps" in calls[0]


def test_the_command_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, version in (("good", "1"), ("bad", "2")):
        (tmp_path / f"{name}.txt").write_text(f"a=={version}\nb=={version}\n")
    monkeypatch.setattr(command, "measure_recipe", lambda versions, **_: measure(versions))
    measure = Measure(b=50)
    flags = [
        "--good",
        str(tmp_path / "good.txt"),
        "--bad",
        str(tmp_path / "bad.txt"),
        "--config",
        str(RECIPES / "optimised.yaml"),
    ]
    assert run_command("bisect", [*flags, "--json", str(tmp_path / "found.json")]) == 0
    assert "b 1 -> 2: +50 B" in capsys.readouterr().out
    assert '"jump": 50' in (tmp_path / "found.json").read_text()


def test_every_environment_reads_the_recipe_that_came_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("good", "1"), ("bad", "2")):
        (tmp_path / f"{name}.txt").write_text(f"a=={version}\n")
    read: list[int] = []

    def measure(versions: Mapping[str, str], *, config: Path, **_: object) -> int:
        read.append(load_recipe(config).lora.lora_r)
        return int(versions["a"])

    monkeypatch.setattr(command, "measure_recipe", measure)
    reader, writer = os.pipe()
    os.write(writer, b"lora: {lora_r: 5}\n")
    os.close(writer)
    flags = ["--good", str(tmp_path / "good.txt"), "--bad", str(tmp_path / "bad.txt"), "--config", f"/dev/fd/{reader}"]
    assert run_command("bisect", flags) == 0
    assert read == [5, 5]


def test_found_is_data() -> None:
    assert Found(("a",), {"a": ("1", "2")}, 1, 2, 1, ()).render().startswith("a 1 -> 2")
