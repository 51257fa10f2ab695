"""One server of forked jobs for all tests, and a cache of builds that the tests own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_lowmem.virtual_gpu import Card, JobResult, Server, get_card

RunJob = Callable[..., JobResult]


@pytest.fixture(scope="session")
def laptop() -> Card:
    return get_card("rtx-4050-laptop-6gb")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    request.getfixturevalue("built")
    with Server(["torch"], max_workers=2) as running:
        yield running


@pytest.fixture
def job(server: Server, laptop: Card) -> RunJob:
    """Runs a function of jobs.py on the laptop's card, or another, and fails the test if it raised."""

    def run_job(function: str, card: Card = laptop, **kwargs: Any) -> JobResult:
        result = server.submit(f"virtual_gpu.jobs:{function}", kwargs, card, timeout=60).result()
        assert result.error is None, result.output_tail
        return result

    return run_job


@pytest.fixture
def cli(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m qlora_lowmem.virtual_gpu ARGUMENTS` in an empty folder."""
    request.getfixturevalue("built")

    def run_cli(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False, **options
        )

    return run_cli
