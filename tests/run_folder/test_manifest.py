"""A sealed folder says itself whether it is as it was written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lowmem.run_folder.checkpoints import MANIFEST, corruption, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "weights").write_bytes(b"0123456789")
    (tmp_path / "sub" / "state").write_bytes(b"abc")
    seal(tmp_path)
    return tmp_path


def test_a_sealed_folder_is_whole(folder: Path) -> None:
    assert corruption(folder) is None


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"01234"), "weights has 5 bytes, and 10 were written"),
        (lambda folder: (folder / "weights").write_bytes(b"0123456788"), "weights is not what was written"),
        (lambda folder: (folder / "sub" / "state").unlink(), "sub/state is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"files"'), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"weights": 3}}'), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, harm: Callable[[Path], object], said: str) -> None:
    harm(folder)
    assert said in str(corruption(folder))
