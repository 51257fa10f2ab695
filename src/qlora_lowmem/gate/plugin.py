"""The pytest plugin: budgets on GPU memory, on a virtual card or, with --gpu, a real one.

It is an entry point, so every pytest run on a machine with this package loads it: what is not needed to declare options
is imported where it is used.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from qlora_lowmem.gate.keys import BUDGET, REPORT_ATTRIBUTE, ROW, SESSION

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession

DEFAULT_CARD = "rtx-4050-laptop-6gb"
_INI = (
    ("vram_budget", "limit of a vram_budget marker without one, as in 6 GB"),
    ("vram_card", f"virtual card of a vram_budget marker without one (default: {DEFAULT_CARD})"),
    ("vram_baselines", "folder of recorded peaks (default: bench/baselines)"),
    ("vram_tolerance", "with --gpu: allowed growth over a baseline, as in 2 MiB (default)"),
    ("vram_tolerance_relative", "with --gpu: allowed growth as a share, as in 0.005 (default); the larger holds"),
    ("vram_reserved_tolerance", "allowed growth of reserved bytes over a baseline, as in 64 MiB (default)"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmark and the gate."""
    group = parser.getgroup("gpu memory", "memory of training jobs, on a virtual card unless --gpu is given")
    group.addoption("--gpu", action="store_true", help="run on the real GPU of this machine: figures are measured")
    group.addoption("--card", metavar="NAME", help=f"the virtual card (default: vram_card, or {DEFAULT_CARD})")
    group.addoption("--vram-cap", metavar="SIZE", help="with --gpu: cap the allocator, as in --vram-cap 6GB")
    group.addoption("--vram-budget", metavar="SIZE", help="limit of a vram_budget marker without one")
    group.addoption("--baselines", metavar="DIR", help="folder of recorded peaks (default: vram_baselines)")
    group.addoption(
        "--record",
        metavar="CASE",
        action="append",
        nargs="?",
        const="",
        help="write the baselines of a passing run: every case that runs, or --record=CASE (repeat for more)",
    )
    group.addoption("--report-only", action="store_true", help="baselines are compared and reported, and fail nothing")
    group.addoption("--across-versions", action="store_true", help="compare with baselines of other package versions")
    group.addoption("--vram-report", metavar="DIR", help="write gate.json, trend.json, summary.md and a chart there")
    for name, text in _INI:
        parser.addini(name, text)


def pytest_configure(config: pytest.Config) -> None:
    """Check the options before anything runs; register the markers."""
    config.addinivalue_line(
        "markers", 'vram_budget(limit, card=NAME, of="allocated"): GPU memory that the test may use, as in "6 GB"'
    )
    if _in_worker(config):
        return
    from qlora_lowmem.gate.session import GateSession, check_options

    check_options(config)
    session = GateSession(config)
    config.stash[SESSION] = session
    config.pluginmanager.register(session, "qlora_lowmem-session")
    if config.getoption("gpu"):
        from qlora_lowmem.gate.meter import Meter

        config.pluginmanager.register(Meter(session.case_of), "qlora_lowmem-meter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check every budget."""
    session = config.stash.get(SESSION, None)
    if session is not None:
        session.check_items(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """A budgeted test runs in a process on its virtual card, unless this is one, or --gpu is given."""
    if BUDGET not in item.stash or item.config.getoption("gpu"):
        return None
    from qlora_lowmem.gate.outer import run_on_virtual_card

    run_on_virtual_card(item, item.config.stash[SESSION])
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a measured test carries what was measured."""
    report = yield
    row = item.stash.get(ROW, None)
    if row is not None and call.when == "call":
        setattr(report, REPORT_ATTRIBUTE, row.to_dict())
    return report


def _in_worker(config: pytest.Config) -> bool:
    """Whether this process runs one test on a virtual card already."""
    return any(type(plugin).__module__ == "qlora_lowmem.gate.worker" for plugin in config.pluginmanager.get_plugins())


@pytest.fixture(scope="session")
def vram_gate(request: pytest.FixtureRequest) -> "GateSession":
    """Holds cases against their baselines: `vram_gate.check(request.node, case, record, attribute)`."""
    return request.config.stash[SESSION]
