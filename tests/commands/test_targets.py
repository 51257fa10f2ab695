"""Where results go is tried before there are any: hours of work are not for a file that cannot be written."""

import json
import os
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.commands import frame as command
from qlora_lowmem.errors import EXIT_USAGE, UsageError

DEMO = ["--config", str(RECIPES / "demo.yaml")]
# A recipe is read after the target was tried, and this one is not there.
COMMANDS: dict[str, list[str]] = {
    "train": [*DEMO, "--data", "nowhere.jsonl"],
    "generate": ["--run", "nowhere", "--prompt", "x"],
    "merge": ["--run", "nowhere", "--to", "merged"],
    "explain": ["--config", "nowhere.yaml"],
    "lengths": ["--config", "nowhere.yaml"],
    "longest": ["--config", "nowhere.yaml"],
    "phases": ["--config", "nowhere.yaml"],
    "plan": ["--config", "nowhere.yaml"],
    "bisect": ["--good", "nowhere.txt", "--bad", "nowhere.txt", "--config", "nowhere.yaml"],
}


@pytest.mark.parametrize("target", ["none/x.json", ".", "", "x" * 300 + ".json"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_json_targets(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.run_command(name, [*COMMANDS[name], "--json", target]) == EXIT_USAGE
    printed = capsys.readouterr().err
    assert "--json: " in printed
    assert "cannot be written" in printed
    assert "give another file" in printed
    assert list(tmp_path.iterdir()) == []


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
        command.check_new_folder("--to", ".")
    (tmp_path / "empty").mkdir()
    assert command.check_new_folder("--to", "empty") == Path("empty")
    assert command.check_new_folder("--to", "a/b/c") == Path("a/b/c")
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
