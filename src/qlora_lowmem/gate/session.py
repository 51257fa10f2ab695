"""One pytest session of the gate: its options, its cases against their baselines, what is written at the end."""

import hashlib
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_lowmem.gate.keys import BUDGET, REPORT_ATTRIBUTE, ROW
from qlora_lowmem.units import parse_bytes

if TYPE_CHECKING:
    from qlora_lowmem import virtual_gpu
    from qlora_lowmem.gate.meter import Case
    from qlora_lowmem.gate.report import Finished
    from qlora_lowmem.gate.verdicts import Gate, Verdict
    from qlora_lowmem.memory.attribution import Attribution
    from qlora_lowmem.results.kinds.verdicts import Record, Row

# What every worker imports.
WORKER_MODULES = ["torch", "qlora_lowmem.gate.worker", "qlora_lowmem.memory.recorder", "qlora_lowmem.gate.outer"]
# The fixture by which a test without a budget is one of the gate's, however far down it is asked for.
_GATE_FIXTURE = "vram_gate"


def check_options(config: pytest.Config) -> None:
    """Raises:
    pytest.UsageError: options that are wrong or contradict each other.
    """
    option: Callable[[str], Any] = config.getoption
    gpu, card, cap = option("gpu"), option("card"), option("vram_cap")
    if card is not None:
        if gpu:
            raise pytest.UsageError(f"--card {card} names a virtual card, and --gpu runs on the real one: give one")
        _check_card("--card", card)
    elif config.getini("vram_card"):
        _check_card("vram_card", config.getini("vram_card"))
    if cap is not None and not gpu:
        raise pytest.UsageError(f"--vram-cap {cap} caps a real GPU: add --gpu, or choose a smaller --card")
    sizes = {"--vram-cap": cap, "--vram-budget": option("vram_budget")}
    sizes |= {name: config.getini(name) for name in ("vram_budget", "vram_tolerance", "vram_reserved_tolerance")}
    for name, size in sizes.items():
        try:
            parse_bytes(size or 0)
        except ValueError as error:
            raise pytest.UsageError(f"{name}: {error}") from None
    share = config.getini("vram_tolerance_relative")
    if share:
        try:
            valid = 0 <= float(share) < 1
        except ValueError:
            valid = False
        if not valid:
            raise pytest.UsageError(f"vram_tolerance_relative: {share!r} is not a share; write 0.005 for 0.5 %")
    if gpu and (getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput")):
        raise pytest.UsageError(
            "--gpu measures one job at a time, and pytest-xdist (-n) runs several: leave -n out, or leave --gpu out "
            "(a virtual card is deterministic, however many run)"
        )
    for name in option("record") or ():
        if name and "::" not in name and Path(name).exists():
            raise pytest.UsageError(
                f"--record {name}: {name} is a path, and --record took it for a case's name. Put --record last, or "
                "write --record=CASE"
            )


def _check_card(name: str, card: str) -> None:
    from qlora_lowmem import virtual_gpu

    try:
        virtual_gpu.get_card(card)
    except virtual_gpu.UnknownCardError as error:
        raise pytest.UsageError(f"{name}: {error}") from None


class GateSession:
    """A plugin: keeps what was found by case, and writes baselines and reports at the end."""

    def __init__(self, config: pytest.Config) -> None:
        from qlora_lowmem.gate.plugin import DEFAULT_CARD

        self.config = config
        self.rows: list[Row] = []
        self.card: str = config.getoption("card") or config.getini("vram_card") or DEFAULT_CARD
        self._limit: str | None = config.getoption("vram_budget") or config.getini("vram_budget") or None
        given = config.getoption("baselines")
        self.baselines = (
            config.invocation_params.dir / given
            if given
            else config.rootpath / (config.getini("vram_baselines") or "bench/baselines")
        )
        self.on_gpu = bool(config.getoption("gpu"))
        self.report_only = bool(config.getoption("report_only"))
        self.across_versions = bool(config.getoption("across_versions"))
        self.record_names: list[str] = config.getoption("record") or []
        self.finished: Finished | None = None
        self._read: dict[str, dict[str, Record]] = {}
        self._server: virtual_gpu.Server | None = None

    def check_items(self, items: list[pytest.Item]) -> None:
        """Read every budget.

        Raises:
            pytest.UsageError: a budget that cannot be read, or reruns asked for of memory tests.
        """
        wrong = []
        for item in items:
            marker = item.get_closest_marker("vram_budget")
            if marker is not None:
                from qlora_lowmem import virtual_gpu
                from qlora_lowmem.gate.budget import budget_of

                try:
                    item.stash[BUDGET] = budget_of(marker.args, dict(marker.kwargs), self._limit, self.card)
                except (ValueError, virtual_gpu.UnknownCardError) as error:
                    wrong.append(f"{item.nodeid}: {error}")
            elif _GATE_FIXTURE not in getattr(item, "fixturenames", ()):
                continue
            if item.get_closest_marker("flaky") or getattr(self.config.option, "reruns", None):
                wrong.append(
                    f"{item.nodeid}: reruns hide what it measures: a peak that comes and goes is a finding. Leave "
                    "--reruns and the flaky marker out"
                )
        if wrong:
            raise pytest.UsageError(*wrong)

    def recording(self, case: str) -> bool:
        """Whether the case's baseline is to be written."""
        return any(self.matches(name, case) for name in self.record_names)

    @staticmethod
    def matches(name: str, case: str) -> bool:
        """Whether `--record=name` means the case: all of it, a test by its last part, or any if empty."""
        return not name or case == name or case.endswith(f"::{name}")

    @property
    def records_all(self) -> bool:
        """Whether every case that runs is recorded, and cases that are gone are taken out."""
        return "" in self.record_names

    def recorded(self, device: str) -> set[str]:
        """Cases that the device's baselines have.

        Raises:
            BaselineError: its file cannot be read.
        """
        self.baseline(device, "")
        return set(self._read[device])

    def gate(self) -> "Gate":
        """The tolerances of this session's device."""
        from qlora_lowmem.gate import verdicts

        default = verdicts.MEASURED if self.on_gpu else verdicts.EXACT
        ini: Callable[[str], str] = self.config.getini
        reserved = verdicts.Tolerance(
            parse_bytes(ini("vram_reserved_tolerance") or default.reserved.absolute), default.reserved.relative
        )
        if not self.on_gpu:
            return verdicts.Gate(default.allocated, reserved)
        allocated = verdicts.Tolerance(
            parse_bytes(ini("vram_tolerance") or default.allocated.absolute),
            float(ini("vram_tolerance_relative") or default.allocated.relative),
        )
        return verdicts.Gate(allocated, reserved)

    def baseline(self, device: str, case: str) -> "Record | None":
        """The recorded peak of a case on a device.

        Raises:
            BaselineError: the device's file cannot be read.
        """
        from qlora_lowmem.gate.baselines import baseline_path, read_baselines

        if device not in self._read:
            self._read[device] = read_baselines(baseline_path(self.baselines, device))
        return self._read[device].get(case)

    def case_of(self, item: pytest.Item) -> "Case | None":
        """A budgeted test and what it is held against; None for any other."""
        from qlora_lowmem.gate.meter import Case
        from qlora_lowmem.memory.device import device_name
        from qlora_lowmem.results.kinds.verdicts import Record

        budget = item.stash.get(BUDGET, None)
        if budget is None:
            return None
        device = device_name() if self.on_gpu else budget.card
        kept = self._cache().get(_cache_key(device, item.nodeid), None) if self._cache() else None
        return Case(
            name=item.nodeid,
            budget=budget,
            baseline=self.baseline(device, item.nodeid),
            last_pass=Record.from_dict(kept) if kept else None,
            gate=self.gate(),
            recording=self.recording(item.nodeid),
            across_versions=self.across_versions,
            report_only=self.report_only,
            artefacts=self.artefacts,
        )

    def server(self) -> "virtual_gpu.Server":
        """Where budgeted tests run, one at a time; started with the first, with torch imported already."""
        from qlora_lowmem import virtual_gpu

        if self._server is None:
            self._server = virtual_gpu.Server(WORKER_MODULES, max_workers=1)
        return self._server

    @property
    def artefacts(self) -> Path:
        """A folder for what failing runs leave; made by whoever writes there."""
        report = self.config.getoption("vram_report")
        if report:
            return Path(report).resolve()
        cache = self._cache()
        return Path(cache.mkdir("vram")) if cache else Path(tempfile.gettempdir()) / "qlora_lowmem-gate"

    def check(
        self,
        item: pytest.Item,
        case: str,
        record: "Record",
        attribute: "Callable[[Path | None], Attribution | None]",
    ) -> "Verdict":
        """Hold a case against its baseline, note the result for the reports, and fail the test if the verdict does.

        Args:
            item: the test that asks.
            attribute: runs the case again with attribution and writes its snapshot to the path that it gets; called
                only if its verdict fails or it is recorded.

        Raises:
            BaselineError: the device's file cannot be read.
        """
        from qlora_lowmem.gate.check import check_case

        verdict, row = check_case(self, item, case, record, attribute)
        self._take(item, row)
        return verdict

    def check_complete(self, item: pytest.Item, device: str, cases: Collection[str]) -> None:
        """Fail if the device's baselines have a recipe that is none of `cases`.

        Raises:
            BaselineError: the device's file cannot be read.
        """
        from qlora_lowmem.gate.check import missing_rows

        for row in missing_rows(self, item, device, set(cases)):
            self._take(item, row)

    @staticmethod
    def _take(item: pytest.Item, row: "Row") -> None:
        item.stash[ROW] = row
        item.user_properties.extend(row.properties())
        if row.fails:
            pytest.fail(row.message, pytrace=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the row of a case that was measured here or in a worker."""
        content = getattr(report, REPORT_ATTRIBUTE, None)
        if content is None:
            return
        from qlora_lowmem.results.kinds.verdicts import Row

        row = Row.from_dict(content)
        self.rows.append(row)
        if row.budget is not None and not row.fails and row.record is not None and self._cache():
            self._cache().set(_cache_key(row.record.key.device, row.case), row.record.to_dict())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write baselines if that was asked for and everything passed, and the reports."""
        if self._server is not None:
            self._server.close()
        if hasattr(self.config, "workerinput") or not (self.rows or self.record_names):
            return
        from qlora_lowmem.gate.report import finish

        self.finished = finish(self, exitstatus)
        if self.finished.failed and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What was recorded, and what is to be done."""
        if self.finished is not None and self.finished.lines:
            terminalreporter.section("gpu memory")
            for line in self.finished.lines:
                terminalreporter.write_line(line)

    def _cache(self) -> Any:
        return getattr(self.config, "cache", None)


def _cache_key(device: str, case: str) -> str:
    return f"vram/{device}-{hashlib.sha256(case.encode()).hexdigest()[:16]}"
