"""One pytest session that judges: its cases held against their budgets and baselines, what is written at the end."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.gate.baselines import BaselineError, baseline_path, read_baselines, record_baselines
from qlora_lowmem.gate.budget import budget_of
from qlora_lowmem.gate.meter import Case, Meter, settle
from qlora_lowmem.gate.records import attributed
from qlora_lowmem.gate.report import publish
from qlora_lowmem.gate.verdicts import EXACT, MEASURED, QUIET, Gate, Tolerance, Verdict, missing
from qlora_lowmem.gate.worker import WORKER_MODULES, failed_report, run_on_virtual_card
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.device import device_name
from qlora_lowmem.owned import own_folder
from qlora_lowmem.results.kinds.verdicts import Budget, Record, Row
from qlora_lowmem.targets import check_folder
from qlora_lowmem.units import parse_bytes

_BUDGET: pytest.StashKey[Budget] = pytest.StashKey()


class GateSession:
    """Keeps what was found by case, and writes baselines and reports at the end.

    Where a case's baselines cannot be read, what asks for them raises `BaselineError`.

    Args:
        config: with options that the plugin has checked.
        default_card: the virtual card where neither a budget, nor an option, nor the ini file names one.
    """

    def __init__(self, config: pytest.Config, default_card: str) -> None:
        self.lines: list[str] = []
        self._config = config
        self._option: Callable[[str], Any] = config.getoption
        self._ini: Callable[[str], str] = config.getini
        self._card: str = self._option("vram_card") or self._ini("vram_card") or default_card
        self._on_gpu = bool(self._option("vram_gpu"))
        self._names: list[str] = self._option("vram_record") or []
        self._rows: list[Row] = []
        self._read: dict[str, dict[str, Record]] = {}
        self._server: virtual_gpu.Server | None = None
        config.pluginmanager.register(Meter(self.case_of), "qlora_lowmem-meter")

    def check_items(self, items: Sequence[pytest.Item]) -> None:
        """Read every budget of tests that have one or ask for the gate; try the folders that are written in the end.

        Raises:
            pytest.UsageError: a budget that cannot be read, reruns asked for of memory tests, or a folder in which
                nothing can be written.
        """
        limit = self._option("vram_budget") or self._ini("vram_budget") or None
        wrong = []
        for item in items:
            marker = item.get_closest_marker("vram_budget")
            if marker is not None:
                try:
                    item.stash[_BUDGET] = budget_of(marker.args, dict(marker.kwargs), limit, self._card)
                except ValueError as error:
                    wrong.append(f"{item.nodeid}: {error}")
            if item.get_closest_marker("flaky") or getattr(self._config.option, "reruns", None):
                wrong.append(
                    f"{item.nodeid}: reruns hide what it measures: a peak that comes and goes is a finding. Leave "
                    "--reruns and the flaky marker out"
                )
        if not hasattr(self._config, "workerinput"):
            try:
                check_folder("--vram-report", self._option("vram_report"))
                check_folder("--vram-baselines", str(self._folder) if self._names else None)
            except UsageError as error:
                wrong.append(str(error))
        if wrong:
            raise pytest.UsageError(*wrong)

    def run(self, item: pytest.Item) -> None:
        """Run a budgeted test in a process on its virtual card, and log its reports as if it had run here."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            card, case = virtual_gpu.get_card(item.stash[_BUDGET].card), self.case_of(item)
            assert case is not None
            reports = run_on_virtual_card(item, case, card, self.server())
        except Exception as error:  # whatever it is, it is this test's report
            reports = [failed_report(item, f"{type(error).__name__}: {error}")]
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def server(self) -> virtual_gpu.Server:
        """Where budgeted tests run, one at a time; started with the first, with torch imported already."""
        if self._server is None:
            self._server = virtual_gpu.Server(WORKER_MODULES, max_workers=1)
        return self._server

    def case_of(self, item: pytest.Item) -> Case | None:
        """A budgeted test and what it is held against; None for any other."""
        budget = item.stash.get(_BUDGET, None)
        if budget is None:
            return None
        return self._case(item.nodeid, device_name() if self._on_gpu else budget.card, budget)

    def check(
        self, item: pytest.Item, case: str, record: Record, attribute: Callable[[Path | None], Attribution | None]
    ) -> Verdict:
        """Hold a case against its baseline, note the result for the reports, and fail the test if the verdict does.

        If its verdict fails or it is recorded, `attribute` runs it again, and writes its snapshot to the path it gets.
        """
        held = self._case(case, record.key.device)
        verdict = held.verdict(record)
        left: tuple[str, ...] = ()
        if verdict.fails or held.recording:
            Path(held.artefacts).mkdir(parents=True, exist_ok=True)
            attribution = attribute(None if held.recording else held.snapshot_path)
            if attribution is not None:
                record = attributed(record, attribution)
                verdict = held.verdict(record)
            if not held.recording:
                left = held.keep(attribution)
        settle(item, held.row(item, record, verdict, left))
        return verdict

    def check_complete(self, item: pytest.Item, device: str, cases: Collection[str]) -> None:
        """Fail if the device's baselines have a recipe that is none of `cases`; tests' own are not looked at."""
        fails = not self._option("vram_report_only") and "" not in self._names
        for name, baseline in sorted(self._baselines(device).items()):
            if name not in cases and "::" not in name:
                message = missing(name, baseline).render()
                settle(item, Row(name, item.location[0], "MISSING", None, baseline, fails=fails, message=message))

    def take(self, content: Mapping[str, Any]) -> None:
        """Keep the row, as plain data, of a case that was judged here or in another process."""
        row = msgspec.convert(content, Row)
        self._rows.append(row)
        if row.budget is not None and not row.fails and row.record is not None and self._cache:
            self._cache.set(_cache_key(row.record.key.device, row.case), msgspec.to_builtins(row.record))

    def finish(self, exit_status: int) -> bool:
        """Write baselines if that was asked for and everything passed, and the reports; `lines` say so.

        Returns whether something of it failed.
        """
        if self._server is not None:
            self._server.close()
        if hasattr(self._config, "workerinput") or not (self._rows or self._names):
            return False
        rows, failed = sorted(self._rows, key=lambda row: row.case), False
        if self._names and exit_status != pytest.ExitCode.OK:
            self.lines = [
                "no baseline was written: the run did not pass, and --vram-record writes those of a passing run"
            ]
        elif self._names:
            try:
                self._record(rows)
            except BaselineError as error:
                self.lines.append(str(error))
                failed = True
        loud = [row for row in rows if row.verdict not in QUIET and not row.fails and not self._recording(row.case)]
        self.lines += [row.message or f"{row.case}: {row.verdict}" for row in loud]
        self.lines += publish(rows, self._option("vram_report"))
        return failed

    def _record(self, rows: Sequence[Row]) -> None:
        chosen = {row.case: row.record for row in rows if row.record is not None and self._recording(row.case)}
        unknown = [name for name in self._names if name and not any(_means(name, case) for case in chosen)]
        if unknown or not chosen:
            ran = ", ".join(row.case for row in rows) or "none"
            name = ", ".join(unknown) or "given"
            raise BaselineError(f"--vram-record: no case of the name {name} ran. Cases that ran: {ran}")
        gone = {row.case for row in rows if row.verdict == "MISSING"} if "" in self._names else set()
        for device in sorted({record.key.device for record in chosen.values()}):
            records = {case: record for case, record in chosen.items() if record.key.device == device}
            path = baseline_path(self._folder, device)
            record_baselines(path, records, forget=gone)
            self.lines.append(f"recorded in {path}: {', '.join(records)}")

    def _recording(self, case: str) -> bool:
        return any(_means(name, case) for name in self._names)

    def _case(self, name: str, device: str, budget: Budget | None = None) -> Case:
        kept = self._cache.get(_cache_key(device, name), None) if budget is not None and self._cache else None
        return Case(
            name=name,
            budget=budget,
            baseline=self._baselines(device).get(name),
            last_pass=msgspec.convert(kept, Record) if kept else None,
            gate=self._gate(),
            recording=self._recording(name),
            across_versions=bool(self._option("vram_across_versions")),
            report_only=bool(self._option("vram_report_only")),
            artefacts=str(self._artefacts()),
        )

    def _gate(self) -> Gate:
        default = MEASURED if self._on_gpu else EXACT
        allocated, reserved = default.allocated, default.reserved
        reserved = Tolerance(parse_bytes(self._ini("vram_reserved_tolerance") or reserved.absolute), reserved.relative)
        if self._on_gpu:
            absolute = parse_bytes(self._ini("vram_tolerance") or allocated.absolute)
            allocated = Tolerance(absolute, float(self._ini("vram_tolerance_relative") or allocated.relative))
        return Gate(allocated, reserved)

    @property
    def _folder(self) -> Path:
        given: str | None = self._option("vram_baselines")
        if given:
            return self._config.invocation_params.dir / given
        return self._config.rootpath / (self._ini("vram_baselines") or "bench/baselines")

    def _baselines(self, device: str) -> dict[str, Record]:
        if device not in self._read:
            self._read[device] = read_baselines(baseline_path(self._folder, device))
        return self._read[device]

    def _artefacts(self) -> Path:
        report = self._option("vram_report")
        if report:
            return Path(report).resolve()
        if self._cache:
            return Path(self._cache.mkdir("vram"))
        return own_folder(Path(tempfile.gettempdir()) / f"qlora_lowmem-gate-{os.getuid()}")

    @property
    def _cache(self) -> Any:
        return getattr(self._config, "cache", None)


def _means(name: str, case: str) -> bool:
    """Whether `--vram-record=name` means the case: all of it, a test by its last part, or any if empty."""
    return not name or case == name or case.endswith(f"::{name}")


def _cache_key(device: str, case: str) -> str:
    return f"vram/{device}-{hashlib.sha256(case.encode()).hexdigest()[:16]}"
