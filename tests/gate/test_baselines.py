"""Baselines survive: interruption, two at once, a corrupt or edited file, a folder that cannot be written."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from gate.examples import record
from helpers import ROOT
from qlora_lowmem.gate import baselines
from qlora_lowmem.gate.baselines import BaselineError, baseline_path, read_baselines, record_baselines

CASES = {"a": record(1), "b": record(2)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = baseline_path(tmp_path / "baselines", "card")
    record_baselines(path, CASES)
    return path


def test_what_is_recorded_is_read(path: Path) -> None:
    assert read_baselines(path) == CASES
    assert path.name == "card.json"


def test_launches_are_recorded_and_a_case_without_them_stays_as_it_was(path: Path) -> None:
    """A file of a version that did not count them is read, and written again as it was."""
    before = path.read_text()
    assert "launches" not in before
    record_baselines(path, {"c": record(3, launches=70)})
    assert read_baselines(path) == CASES | {"c": record(3, launches=70)}
    record_baselines(path, {}, forget={"c"})
    assert path.read_text() == before


def test_no_file_is_no_baselines(tmp_path: Path) -> None:
    assert read_baselines(tmp_path / "none.json") == {}


def test_recording_one_case_changes_its_block_alone(path: Path) -> None:
    before = path.read_text().splitlines()
    record_baselines(path, {"b": record(2, reserved=99)})
    after = path.read_text().splitlines()
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert len(changed) == 2
    assert "checksum" in changed[0]
    assert changed[1].strip() == '"reserved": 99,'


def test_the_same_figures_give_the_same_file(path: Path) -> None:
    before = path.read_bytes()
    record_baselines(path, dict(reversed(CASES.items())))
    assert path.read_bytes() == before


def test_forget(path: Path) -> None:
    record_baselines(path, {"c": record(3)}, forget={"a"})
    assert set(read_baselines(path)) == {"b", "c"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text[:0], "not valid JSON"),
        (lambda text: "<<<<<<< HEAD\n" + text, "conflict marks"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema is 2 and this version reads 1"),
        (lambda text: text[:0] + "[]", "schema is None"),
        (lambda text: text.replace('"allocated": 2', '"allocated": 3'), "case 'b' does not have its checksum"),
        (lambda text: text.replace('"a": {', '"renamed": 1, "a": {'), "case 'renamed' is not an object"),
    ],
)
def test_corrupt_or_edited_is_an_error_and_is_never_overwritten(path: Path, change: Any, said: str) -> None:
    broken = change(path.read_text())
    path.write_text(broken)
    with pytest.raises(BaselineError, match=said) as reading:
        read_baselines(path)
    assert "Restore it" in str(reading.value)
    with pytest.raises(BaselineError, match=said):
        record_baselines(path, {"c": record(3)})
    assert path.read_text() == broken


def test_bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BaselineError, match="cannot be read"):
        read_baselines(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda case: case.pop("allocated"), "allocated"),
        (lambda case: case.update(allocated=1.5), "float"),
        (lambda case: case.update(allocated=True), "bool"),
        (lambda case: case["kinds"].update(loss="7"), "str"),
        (lambda case: case.update(of_a_later_version=1), "unknown: of_a_later_version"),
    ],
)
def test_a_valid_checksum_over_something_else(path: Path, change: Any, said: str) -> None:
    content = json.loads(path.read_text())
    case = {key: value for key, value in content["cases"]["a"].items() if key != "checksum"}
    change(case)
    content["cases"]["a"] = {**case, "checksum": baselines._checksum(case)}
    path.write_text(json.dumps(content))
    with pytest.raises(BaselineError, match=f"case 'a' is not a record: .*{said}"):
        read_baselines(path)


def test_the_committed_baselines_are_what_is_written() -> None:
    """To the byte: recording one case again changes no other."""
    files = sorted((ROOT / "bench" / "baselines").glob("*.json"))
    assert files
    for file in files:
        assert baselines.render(read_baselines(file)) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = path.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        record_baselines(path, {"a": record(9)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    record_baselines(path, {"a": record(9)})  # and no lock was left
    assert read_baselines(path)["a"].allocated == 9


def test_killed_while_it_writes(path: Path) -> None:
    """SIGKILL with the temporary file half written: the old baselines are there, and the next recording works."""
    code = """
        import os, sys, time
        from pathlib import Path
        from gate.examples import record
        from qlora_lowmem.gate import baselines
        baselines.os.fsync = lambda _: (print("writing", flush=True), time.sleep(60))
        baselines.record_baselines(Path(sys.argv[1]), {"a": record(9)})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'src'}"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_baselines(path) == CASES
    record_baselines(path, {"c": record(3)})
    assert set(read_baselines(path)) == {"a", "b", "c"}


def _record_some(path: Path, name: str) -> None:
    for count in range(5):
        record_baselines(path, {f"{name}-{count}": record(count)})


def test_two_at_once_lose_nothing(path: Path) -> None:
    workers = [multiprocessing.Process(target=_record_some, args=(path, name)) for name in ("one", "two", "three")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    names = {f"{name}-{count}" for name in ("one", "two", "three") for count in range(5)}
    assert set(read_baselines(path)) == names | {"a", "b"}
    assert list(path.parent.iterdir()) == [path]


def test_a_lock_that_is_never_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_LOCK_SECONDS", 0.1)
    started = time.monotonic()
    with baselines._locked(path.parent), pytest.raises(BaselineError, match="another process has been recording"):
        record_baselines(path, {"a": record(9)})
    assert time.monotonic() - started < 5
    assert read_baselines(path) == CASES


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_read_only_folder(path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    before = path.read_bytes()

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BaselineError, match=r"cannot be written: .*Nothing was changed.*--vram-baselines DIR"):
        record_baselines(path, {"a": record(9)})
    assert path.read_bytes() == before


def test_rename_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(BaselineError, match="Operation not permitted"):
        record_baselines(path, {"a": record(9)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BaselineError, match="cannot be"):
        record_baselines(tmp_path / "taken" / "card.json", CASES)
