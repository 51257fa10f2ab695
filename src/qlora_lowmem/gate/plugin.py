"""The pytest plugin: budgets on GPU memory, on a virtual card or, with --vram-gpu, a real one.

It is an entry point, so every pytest run on a machine with this package loads it: the gate itself is imported with the
first test that it judges.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_lowmem.gate import JUDGE, REPORT_ATTRIBUTE

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession

DEFAULT_CARD = "rtx-4050-laptop-6gb"
_INI = (
    ("vram_budget", "limit of a vram_budget marker without one, as in 6 GB"),
    ("vram_card", f"virtual card of a vram_budget marker without one (default: {DEFAULT_CARD})"),
    ("vram_baselines", "folder of recorded peaks (default: bench/baselines)"),
    ("vram_tolerance", "with --vram-gpu: allowed growth over a baseline, as in 2 MiB (default)"),
    ("vram_tolerance_relative", "with --vram-gpu: allowed growth as a share, as in 0.005 (default); the larger holds"),
    ("vram_reserved_tolerance", "allowed growth of reserved bytes over a baseline, as in 64 MiB (default)"),
)
_SIZES = ("vram_budget", "vram_tolerance", "vram_reserved_tolerance")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmark and the gate."""
    group = parser.getgroup("gpu memory", "memory of training jobs, on a virtual card unless --vram-gpu is given")
    group.addoption("--vram-gpu", action="store_true", help="run on the real GPU of this machine: figures are measured")
    group.addoption("--vram-card", metavar="NAME", help=f"the virtual card (default: vram_card, or {DEFAULT_CARD})")
    group.addoption("--vram-cap", metavar="SIZE", help="with --vram-gpu: cap the allocator, as in --vram-cap 6GB")
    group.addoption("--vram-budget", metavar="SIZE", help="limit of a vram_budget marker without one")
    group.addoption("--vram-baselines", metavar="DIR", help="folder of recorded peaks (default: vram_baselines)")
    group.addoption(
        "--vram-record",
        metavar="CASE",
        action="append",
        nargs="?",
        const="",
        help="write the baselines of a passing run: every case that runs, or --vram-record=CASE (again for more)",
    )
    group.addoption(
        "--vram-report-only", action="store_true", help="baselines are compared and reported, and fail nothing"
    )
    group.addoption(
        "--vram-across-versions", action="store_true", help="compare with baselines of other package versions"
    )
    group.addoption("--vram-report", metavar="DIR", help="write gate.json, trend.json, summary.md and a chart there")
    for name, text in _INI:
        parser.addini(name, text)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; check the options before anything runs, but in a worker, where they are not its own."""
    config.addinivalue_line(
        "markers",
        'vram_budget(limit, card=NAME, of="allocated", launches=N): GPU memory that the test may use, as in "6 GB"; '
        "kernels, copies and memsets that it may launch",
    )
    if not config.pluginmanager.is_blocked(JUDGE):
        _check_options(config)
        config.pluginmanager.register(Judge(config), JUDGE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Read every budget."""
    judge = config.pluginmanager.get_plugin(JUDGE)
    if judge is not None:
        judge.check_items(items)


@pytest.fixture(scope="session")
def vram_gate(request: pytest.FixtureRequest) -> "GateSession":
    """Holds cases against their baselines: `vram_gate.check(request.node, case, record, attribute)`."""
    judge = request.config.pluginmanager.get_plugin(JUDGE)
    assert isinstance(judge, Judge)
    return judge.session


class Judge:
    """pytest's hooks of a session that judges. The session is made, and the gate imported, when it is first needed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @functools.cached_property
    def session(self) -> "GateSession":
        """What is judged, and how it came out."""
        from qlora_lowmem.gate.session import GateSession

        return GateSession(self._config, DEFAULT_CARD)

    def check_items(self, items: Sequence[pytest.Item]) -> None:
        """Read the budgets of those that have one, or that ask for the gate by its fixture, however far down."""
        judged = [item for item in items if _has_budget(item) or "vram_gate" in getattr(item, "fixturenames", ())]
        if judged:
            self.session.check_items(judged)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """A budgeted test runs in a process on its virtual card, or with --vram-gpu here."""
        if not _has_budget(item) or self._config.getoption("vram_gpu"):
            return None
        self.session.run(item)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what was judged, here or in another process."""
        row = getattr(report, REPORT_ATTRIBUTE, None)
        if row is not None:
            self.session.take(row)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write baselines and reports."""
        needed = self._began or self._config.getoption("vram_record")
        if needed and self.session.finish(exitstatus) and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What was recorded, and what is to be done."""
        if self._began and self.session.lines:
            terminalreporter.section("gpu memory")
            for line in self.session.lines:
                terminalreporter.write_line(line)

    @property
    def _began(self) -> bool:
        return "session" in vars(self)


def _has_budget(item: pytest.Item) -> bool:
    return item.get_closest_marker("vram_budget") is not None


def _check_options(config: pytest.Config) -> None:
    """Raises:
    pytest.UsageError: options that are wrong or contradict each other.
    """
    gpu, card, cap = (config.getoption(name) for name in ("vram_gpu", "vram_card", "vram_cap"))
    if gpu and card is not None:
        raise pytest.UsageError(
            f"--vram-card {card} names a virtual card, and --vram-gpu runs on the real one: give one"
        )
    if cap is not None and not gpu:
        raise pytest.UsageError(f"--vram-cap {cap} caps a real GPU: add --vram-gpu, or choose a smaller --vram-card")
    checks: list[tuple[str, Callable[[str], object], str | None]] = [
        ("--vram-card", _card, card),
        ("vram_card", _card, None if card else config.getini("vram_card")),
        ("--vram-cap", _size, cap),
        ("--vram-budget", _size, config.getoption("vram_budget")),
        *((name, _size, config.getini(name)) for name in _SIZES),
        ("vram_tolerance_relative", _share, config.getini("vram_tolerance_relative")),
    ]
    for name, read, value in checks:
        try:
            if value:
                read(value)
        except ValueError as error:
            raise pytest.UsageError(f"{name}: {error}") from None
    if gpu and (getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput")):
        raise pytest.UsageError(
            "--vram-gpu measures one job at a time, and pytest-xdist (-n) runs several: leave -n or --vram-gpu out "
            "(a virtual card is deterministic, however many run)"
        )
    for name in config.getoption("vram_record") or ():
        if name and "::" not in name and Path(name).exists():
            raise pytest.UsageError(
                f"--vram-record {name}: {name} is a path, and was taken for a case's name. Put --vram-record last, or "
                "write --vram-record=CASE"
            )


def _size(text: str) -> None:
    from qlora_lowmem.units import parse_bytes

    parse_bytes(text)


def _card(name: str) -> None:
    from qlora_lowmem import virtual_gpu

    try:
        virtual_gpu.get_card(name)
    except virtual_gpu.VirtualGPUError as error:
        raise ValueError(error) from None


def _share(text: str) -> None:
    try:
        valid = 0 <= float(text) < 1
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{text!r} is not a share; write 0.005 for 0.5 %")
