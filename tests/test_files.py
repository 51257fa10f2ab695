"""Small files are read with limits, whatever a path leads to."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lowmem import files
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE, UsageError
from qlora_lowmem.files import cache_folder, is_file, is_folder, read_json, read_small, read_text, user_path
from qlora_lowmem.virtual_gpu import build


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def linked(target: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def written(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def endless(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(2**40)
    return path


PATHS: list[tuple[Callable[[Path], Path], str]] = [
    (lambda path: path, "No such file"),
    (lambda path: path.parent, "it is a folder"),
    (pipe, "it is a pipe, and nobody wrote"),
    (linked("/dev/zero"), "it is a device or a socket"),
    (linked("/proc/self/mem"), "Input/output error"),
    (lambda path: path.with_name("x" * 300), "File name too long"),
    (lambda path: Path("~nobody9", path.name), "No such file"),
    (endless, "it has more than 64.0 MiB"),
    (written("a".encode("utf-16")), "it is UTF-16; save the file as UTF-8"),
    (written(b"\xff\xfe\0\0"), "it is UTF-32"),
    (written(b"a\n\xe9"), "line 2: byte 0xe9 is not UTF-8"),
    (written(b"[" * 100_000), "nested too deeply"),
    (written(b"9" * 5000), "it is no JSON"),
    (written(b'{"a": '), "it is no JSON"),
    (lambda _: Path("a\0b"), "null (byte|character)"),
]


@pytest.mark.parametrize(("make", "says"), PATHS)
def test_what_is_no_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], says: str
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    with pytest.raises(OSError, match=says):
        read_json(user_path(make(tmp_path / "file")))


def test_what_is_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert read_text(path) == '{"a": 1}'
    assert read_small(path, 11).startswith(b"\xef")
    with pytest.raises(OSError, match="it has more than 10 B"):
        read_small(path, 10)


def test_a_pipe_is_read_to_its_end_and_no_further(tmp_path: Path) -> None:
    path = pipe(tmp_path / "pipe")
    writer = threading.Thread(target=path.write_bytes, args=(b"x" * 300_000,))
    writer.start()
    assert read_small(path) == b"x" * 300_000
    writer.join()


def test_paths_that_cannot_be_looked_at_are_none() -> None:
    for path in ("x" * 300, "/etc/passwd/x", "a\0b"):
        assert not is_file(path)
        assert not is_folder(path)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORA_LOWMEM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it is with neither HOME nor an entry
    with pytest.raises(UsageError, match="set QLORA_LOWMEM_CACHE to a folder"):
        cache_folder("plan")
    assert user_path("~/x") == Path("~/x")
    assert build._cache_roots() == [build._temporary_folder() / "virtual_gpu"]


def test_a_path_in_a_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bisect", ["--good", "x/" * 3000, "--bad", "y", "--config", "z"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "File name too long" in said
    assert len(said) < 500
