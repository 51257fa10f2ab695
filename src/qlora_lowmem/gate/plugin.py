"""pytest options and fixtures for memory benchmarks: the same tests on a virtual card or, with --gpu, a real one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.cases import GpuRunner, Runner, VirtualRunner
from qlora_lowmem.units import parse_bytes
from qlora_lowmem.virtual_runs import recipe_server

DEFAULT_CARD = "rtx-4050-laptop-6gb"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmark."""
    group = parser.getgroup("gpu memory", "memory of training jobs, on a virtual card unless --gpu is given")
    group.addoption("--gpu", action="store_true", help="run on the real GPU of this machine: figures are measured")
    group.addoption("--card", metavar="NAME", help=f"the virtual card (default: {DEFAULT_CARD})")
    group.addoption("--vram-cap", metavar="SIZE", help="with --gpu: cap the allocator, as in --vram-cap 6GB")
    group.addoption("--results", metavar="DIR", default="results", help="where tables are written (default: results)")


def pytest_configure(config: pytest.Config) -> None:
    """Check the options before anything runs; register the markers."""
    config.addinivalue_line("markers", "gpu: needs a real GPU; runs with --gpu only")
    card, cap, gpu = (config.getoption(name) for name in ("card", "vram_cap", "gpu"))
    if card is not None:
        if gpu:
            raise pytest.UsageError(f"--card {card} names a virtual card, and --gpu runs on the real one: give one")
        try:
            virtual_gpu.get_card(card)
        except virtual_gpu.UnknownCardError as error:
            raise pytest.UsageError(f"--card: {error}") from None
    if cap is not None:
        if not gpu:
            raise pytest.UsageError(f"--vram-cap {cap} caps a real GPU: add --gpu, or choose a smaller --card")
        try:
            parse_bytes(cap)
        except ValueError as error:
            raise pytest.UsageError(f"--vram-cap: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --gpu, tests that need a real one are skipped and say so."""
    if config.getoption("gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU: pytest bench/ --gpu"))


@pytest.fixture(scope="session")
def on_gpu(request: pytest.FixtureRequest) -> bool:
    """Whether figures are measured on a real GPU."""
    return bool(request.config.getoption("gpu"))


@pytest.fixture(scope="session")
def results_folder(request: pytest.FixtureRequest) -> Path:
    """Where tables are written."""
    return Path(request.config.getoption("results"))


@pytest.fixture(scope="session")
def virtual_server() -> Iterator[virtual_gpu.Server]:
    """A server of virtual runs, two at a time."""
    with recipe_server(max_workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Runner:
    """Runs cases on the device that the options name."""
    if request.config.getoption("gpu"):
        return GpuRunner(request.config.getoption("vram_cap"))
    card = virtual_gpu.get_card(request.config.getoption("card") or DEFAULT_CARD)
    return VirtualRunner(request.getfixturevalue("virtual_server"), card)
