"""One budgeted test in a process on its virtual card: handed over here, run by pytest there, its reports taken back."""

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate import JUDGE
from qlora_lowmem.gate.meter import Case, Meter

# What every worker imports before its first test. Inductor is what `torch.cuda.memory._snapshot` imports.
WORKER_MODULES = ["torch", "torch._inductor", "qlora_lowmem.gate.worker", "qlora_lowmem.memory.recorder"]
# Options that say what a session runs and how it reports; the worker runs one test and reports to this session.
_NOT_HANDED_OVER = frozenset(
    (
        *("file_or_dir", "args", "plugins", "markexpr", "keyword", "deselect", "ignore", "ignore_glob", "lf"),
        *("failedfirst", "newfirst", "last_failed_no_failures", "cacheshow", "cacheclear", "stepwise"),
        *("stepwise_skip", "stepwise_reset", "numprocesses", "maxprocesses", "dist", "tx", "px", "rsyncdir"),
        *("distload", "looponfail", "testrunuid", "maxfail", "collectonly", "xmlpath", "reportlog", "report_log"),
        *("basetemp", "usepdb", "usepdb_cls", "trace", "record", "vram_report", "gpu", "pastebin", "setuponly"),
        *("setupshow", "setupplan", "capture", "log_file", "reruns", "durations", "noconftest", "confcutdir"),
        *("inifilename", "rootdir", "help", "version", "override_ini", "importmode", "pythonwarnings"),
    )
)


def run_on_virtual_card(
    item: pytest.Item, case: Case, card: virtual_gpu.Card, server: virtual_gpu.Server
) -> list[pytest.TestReport]:
    """Run the test in a worker and return its reports as if it had run here: output, skips, xfails, durations."""
    config = item.config
    arguments = {
        "node": f"{item.path}::{item.nodeid.partition('::')[2]}",
        "folder": str(config.invocation_params.dir),
        "arguments": _arguments(config),
        "options": _options(config),
        "case": msgspec.to_builtins(case),
    }
    job = server.submit("qlora_lowmem.gate.worker:run_test", arguments, card).result()
    value = job.value or {"reports": [], "problems": []}
    reports = []
    for data in value["reports"]:
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        report.nodeid, report.location = item.nodeid, item.location
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # of a skip: (file, line, reason); JSON has no tuples
        reports.append(report)
    if not any(report.when == "teardown" for report in reports):
        reason = "\n".join(value["problems"]) or job.error or f"it ended with exit code {job.exit_code}"
        message = f"on {card.name}, the process of this test did not finish: {reason}"
        reports.append(failed_report(item, message, job.output_tail))
    return reports


def failed_report(item: pytest.Item, message: str, output: str = "") -> pytest.TestReport:
    """The report of a test that failed for another reason than its own code."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=message,
        when="call",
        sections=[("Captured output of the process", output)] if output else [],
    )


def _arguments(config: pytest.Config) -> list[str]:
    """The command line of the same pytest in the worker, without what to run."""
    found = ["--rootdir", str(config.rootpath), "--import-mode", str(config.getoption("importmode"))]
    if config.inipath is not None:
        found += ["-c", str(config.inipath)]
    if config.option.confcutdir:
        found += ["--confcutdir", str(config.option.confcutdir)]
    for flag, name in (("-o", "override_ini"), ("-W", "pythonwarnings"), ("-p", "plugins")):
        for given in getattr(config.option, name) or ():
            found += [flag, given]
    # Registered by whatever way this session knows it, and under the same name.
    return [*found, "-p", "qlora_lowmem.gate.plugin"]


def _options(config: pytest.Config) -> dict[str, Any]:
    found = {}
    for name, value in vars(config.option).items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        if name not in _NOT_HANDED_OVER:
            found[name] = value
    return found


class WorkerPlugin:
    """In the worker: takes over the options of the session that judges, and keeps every report."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._config: pytest.Config | None = None
        self.reports: list[dict[str, Any]] = []
        self.problems: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Options that a project's own conftest.py declares mean the same here."""
        self._config = config
        for name, value in self._options.items():
            if name in vars(config.option):
                setattr(config.option, name, value)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep it, as pytest-xdist would send it."""
        assert self._config is not None
        self.reports.append(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected here."""
        if report.failed:
            self.problems.append(str(report.longrepr))


def run_test(
    node: str, folder: str, arguments: list[str], options: dict[str, Any], case: dict[str, Any]
) -> dict[str, Any]:
    """In the worker: run the test `node` (`/path/test_file.py::test`) in `folder`.

    Returns `reports` as pytest serialises them, and `problems` of its collection.
    """
    os.chdir(folder)
    given = msgspec.convert(case, Case)
    worker = WorkerPlugin(options)
    for name in (JUDGE, "cacheprovider", "xdist", "terminalreporter"):
        arguments += ["-p", f"no:{name}"]
    pytest.main([*arguments, node], plugins=[worker, Meter(lambda _item: given)])
    return {"reports": worker.reports, "problems": worker.problems}
