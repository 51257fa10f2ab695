"""Where results go is tried before there are any: hours of work are not for a file that cannot be written."""

import io
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES, ROOT
from qlora_lowmem import targets
from qlora_lowmem.commands import frame as command
from qlora_lowmem.errors import EXIT_USAGE, UsageError

DEMO = ["--config", str(RECIPES / "demo.yaml")]
RESULT = str(ROOT / "results" / "reality.json")
# What a command would read or run is looked at after the target was tried, and most of this is not there.
COMMANDS: dict[str, list[str]] = {
    "train": [*DEMO, "--data", "nowhere.jsonl", "--json"],
    "generate": ["--run", "nowhere", "--prompt", "x", "--json"],
    "merge": ["--run", "nowhere", "--to", "merged", "--json"],
    "explain": ["--config", "nowhere.yaml", "--json"],
    "explain --markdown": [*DEMO, "--markdown"],
    "explain --svg": [*DEMO, "--svg"],
    "explain --png": [*DEMO, "--png"],
    "explain --snapshot": [*DEMO, "--snapshot"],
    "lengths": ["--config", "nowhere.yaml", "--json"],
    "longest": ["--config", "nowhere.yaml", "--json"],
    "phases": ["--config", "nowhere.yaml", "--json"],
    "plan": ["--config", "nowhere.yaml", "--json"],
    "bisect": ["--good", "nowhere.txt", "--bad", "nowhere.txt", "--config", "nowhere.yaml", "--json"],
    "data": ["check", "nowhere.jsonl", "--json"],
    "virtual-gpu": ["--card", "t4-16gb", "--json", "TARGET", "--", "false"],
    "report": [RESULT, "--output"],
    "readme": ["--results", str(ROOT / "results"), "--readme"],
}
FOLDERS: dict[str, list[str]] = {
    "lengths": ["--config", "nowhere.yaml", "--table"],
    "longest": ["--config", "nowhere.yaml", "--table"],
    "report": [RESULT, "--charts"],
    "bisect": ["--good", "nowhere.txt", "--bad", "nowhere.txt", "--config", "nowhere.yaml", "--overlays"],
}
LONG = "x" * 300 + ".json"


def refused(name: str, words: list[str], target: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of the target, after `words` or in the place of `TARGET`."""
    given = [target if word == "TARGET" else word for word in words]
    given += [] if "TARGET" in words else [target]
    assert command.run_command(name.split()[0], given) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: --")
    return said


def test_trying_a_folder_puts_no_name_there_that_an_interrupt_could_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    class Room(bytes):
        def __getitem__(self, part: Any) -> Any:
            seen.append(os.listdir(tmp_path))  # noqa: PTH208
            return super().__getitem__(part)

    monkeypatch.setattr(targets, "_ROOM", Room(9))
    targets.check_file("--json", str(tmp_path / "out.json"))
    assert seen == [[]]


@pytest.mark.parametrize("target", ["none/x.json", ".", "new/", "", LONG, "/dev/full", "file/x.json"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_files(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = refused(name, COMMANDS[name], target, capsys)
    assert "cannot be written" in said
    assert "give another file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("target", ["file", "file/folder", "", LONG, "/proc/folder"])
@pytest.mark.parametrize("name", list(FOLDERS))
def test_folders(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = refused(name, FOLDERS[name], target, capsys)
    assert "cannot be written" in said
    assert "give another folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process take a few bytes each, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("check", [targets.check_file, targets.check_folder])
def test_a_full_disk_is_told_before(check: Callable[[str, str], None], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--x: .* cannot be written \(File too large\)"), no_room():
        check("--x", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_where_the_disk_fills_meanwhile_text_goes_to_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, there = io.StringIO(), tmp_path / "there.md"
    monkeypatch.setattr("sys.stdout", out)
    there.write_text("before")
    wrote: list[str] = []
    message = r"(?s)a.json.* is on standard output.*there.md.* \(File too large\); make room on that disk, or give"
    with pytest.raises(UsageError, match=message), no_room():
        targets.write_each(
            lambda: command.write_json(str(tmp_path / "a.json"), {"a": "b" * 100}),
            lambda: targets.write("--markdown", str(there), b"c" * 101),
            lambda: wrote.append("the rest"),
        )
    assert json.loads(out.getvalue()) == {"a": "b" * 100}
    assert there.read_text() == "before"
    assert wrote == ["the rest"]
    assert list(tmp_path.iterdir()) == [there]


def test_a_working_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    for name, words in COMMANDS.items():
        assert command.run_command(name.split()[0], [word.replace("TARGET", "/x") for word in words]) == EXIT_USAGE
        assert capsys.readouterr().err.startswith("error: the working directory does not exist any more")


def test_a_name_of_full_length(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 127)  # two bytes each, of 255
    targets.check_file("--x", str(target))
    targets.write("--x", str(target), "content")
    assert target.read_text() == "content"


@pytest.mark.parametrize("to", [".", "", "..", "file/new", "/proc/new", "full"])
def test_folders_to_be_made(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    (here / "full" / "of").mkdir(parents=True)
    (here / "file").touch()
    monkeypatch.chdir(here)
    assert command.run_command("merge", ["--run", "nowhere", "--to", to]) == EXIT_USAGE
    assert capsys.readouterr().err.startswith("error: --to: ")


def test_the_empty_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        targets.check_new_folder("--to", ".")
    (tmp_path / "empty").mkdir()
    assert targets.check_new_folder("--to", "empty") == Path("empty")
    assert targets.check_new_folder("--to", "a/b/c") == Path("a/b/c")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty"]


def test_a_file_in_the_folder_that_is_made(tmp_path: Path) -> None:
    coming = tmp_path / "run"
    command.check_json_target(str(coming / "summary.json"), coming=coming)
    with pytest.raises(UsageError, match="--json"):
        command.check_json_target(str(coming / "summary.json"))
    with pytest.raises(UsageError, match="--json"):
        command.check_json_target(str(tmp_path / "other" / "summary.json"), coming=coming)


def test_a_pipe_is_written_into_and_a_link_is_kept(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    command.check_json_target(f"/dev/fd/{writer}")
    command.write_json(f"/dev/fd/{writer}", {"a": 1})
    os.close(writer)
    with os.fdopen(reader) as content:
        assert json.load(content) == {"a": 1}
    (tmp_path / "real.json").touch()
    (tmp_path / "link.json").symlink_to("real.json")
    command.write_json(str(tmp_path / "link.json"), {"a": 2})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 2}
