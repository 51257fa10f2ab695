"""In the outer session: a budgeted test is handed to a process on its virtual card, and its reports are taken over."""

import dataclasses
import json
from typing import Any

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.keys import BUDGET
from qlora_lowmem.gate.session import GateSession

# Options that say what a session runs and how it reports; the worker runs one test and reports to us.
_OURS = frozenset(
    (
        *("file_or_dir", "args", "plugins", "markexpr", "keyword", "deselect", "ignore", "ignore_glob", "lf"),
        *("failedfirst", "newfirst", "last_failed_no_failures", "cacheshow", "cacheclear", "stepwise"),
        *(
            "stepwise_skip",
            "stepwise_reset",
            "numprocesses",
            "maxprocesses",
            "dist",
            "tx",
            "px",
            "rsyncdir",
            "distload",
        ),
        *("looponfail", "testrunuid", "maxfail", "collectonly", "xmlpath", "reportlog", "report_log", "basetemp"),
        *("usepdb", "usepdb_cls", "trace", "record", "vram_report", "gpu", "pastebin", "setuponly", "setupshow"),
        *("setupplan", "capture", "log_file", "reruns", "durations", "noconftest", "confcutdir", "inifilename"),
        *("rootdir", "help", "version", "override_ini", "importmode", "pythonwarnings"),
    )
)


def run_on_virtual_card(item: pytest.Item, session: GateSession) -> None:
    """Run the test in a worker and log its reports as if it had run here: output, skips, xfails, durations."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, session):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _reports(item: pytest.Item, session: GateSession) -> list[pytest.TestReport]:
    config = item.config
    try:
        case = session.case_of(item)
        card = virtual_gpu.get_card(item.stash[BUDGET].card)
        assert case is not None
        content = dataclasses.asdict(case) | {"artefacts": str(case.artefacts)}
        rest = item.nodeid.partition("::")[2]
        arguments: dict[str, Any] = {
            "node": f"{item.path}::{rest}",
            "folder": str(config.invocation_params.dir),
            "arguments": _arguments(config),
            "options": _options(config),
            "case": content,
        }
        job = session.server().submit("qlora_lowmem.gate.worker:run_test", arguments, card).result()
    except Exception as error:  # whatever it is, it is this test's report
        return [_failed(item, f"{type(error).__name__}: {error}")]
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
        reports.append(
            _failed(item, f"on {card.name}, the process of this test did not finish: {reason}", job.output_tail)
        )
    return reports


def _arguments(config: pytest.Config) -> list[str]:
    """The command line of the same pytest in the worker, without what to run."""
    found = ["--rootdir", str(config.rootpath)]
    if config.inipath is not None:
        found += ["-c", str(config.inipath)]
    if config.option.confcutdir:
        found += ["--confcutdir", str(config.option.confcutdir)]
    for pair in config.option.override_ini or ():
        found += ["-o", pair]
    for warning in config.option.pythonwarnings or ():
        found += ["-W", warning]
    for name in config.option.plugins or ():
        found += ["-p", name]
    found += ["--import-mode", str(config.getoption("importmode"))]
    # Registered by whatever way the outer session knows it, and under the same name.
    return [*found, "-p", "qlora_lowmem.gate.plugin"]


def _options(config: pytest.Config) -> dict[str, Any]:
    found = {}
    for name, value in vars(config.option).items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        if name not in _OURS:
            found[name] = value
    return found


def _failed(item: pytest.Item, message: str, output: str = "") -> pytest.TestReport:
    sections = [("Captured output of the process", output)] if output else []
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=message,
        when="call",
        sections=sections,
    )
