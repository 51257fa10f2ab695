"""Sessions of pytest inside a test: in this process, in an empty folder, with one server of workers for all of them."""

from collections.abc import Callable, Iterator

import pytest
import torch

from gate.user_project import FEW_PLUGINS, Run
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.session import GateSession
from qlora_lowmem.gate.worker import WORKER_MODULES

# Sessions in this process forget the modules that they imported, and torch cannot be imported twice.
assert torch.__version__


@pytest.fixture(scope="session")
def server(built: None) -> Iterator[virtual_gpu.Server]:
    """One for all sessions, which saves each of them the import of torch."""
    del built
    with virtual_gpu.Server(WORKER_MODULES) as server:
        for card in ("rtx-4050-laptop-6gb", "t4-16gb"):  # started here, where the cache is that of the user
            server.submit("os:getpid", {}, virtual_gpu.get_card(card)).result()
        yield server


@pytest.fixture
def run_here(
    pytester: pytest.Pytester, server: virtual_gpu.Server, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """A session of pytest in this process, in an empty folder; its tests run in workers all the same."""
    monkeypatch.setattr(GateSession, "server", lambda _self: server)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> Run:
        result = pytester.runpytest_inprocess("-p", "qlora_lowmem.gate.plugin", *FEW_PLUGINS, *arguments)
        return Run(int(result.ret), str(result.stdout), str(result.stderr))

    return run
