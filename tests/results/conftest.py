"""One page for all tests that read one: the committed attributions, and a small file of every other kind."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock

from helpers import ROOT
from qlora_lowmem.commands.frame import run_command
from results.examples import CARD, write_all

main = partial(run_command, "report")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file of every kind; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("written")
    write_all(folder)
    return folder


@pytest.fixture
def results(written: Path, tmp_path: Path) -> Path:
    """A copy of those, to be changed."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in written.glob("*.json"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def page_folder(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page is made of."""
    folder = tmp_path_factory.mktemp("results") / "all"
    shutil.copytree(written, folder)
    for path in (ROOT / "results" / CARD).glob("attribution-*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def page(page_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of it. Its charts take seconds: the first of xdist's processes that asks for it makes it for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    output = folder / "report.html"
    with FileLock(folder / "report.lock"):
        if not output.exists():
            assert main([str(page_folder), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def soup(page: Path) -> BeautifulSoup:
    """The page, parsed."""
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
