"""In a process on a virtual card: run one test with pytest, and hand back its reports as they are."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_lowmem.gate.meter import Case, Meter
from qlora_lowmem.gate.verdicts import Gate, Tolerance
from qlora_lowmem.results.kinds.verdicts import Budget, Record


class WorkerPlugin:
    """Takes the outer session's options over, and keeps every report. The gate knows by it that it is in a worker."""

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
    """Run the test `node` (`/path/test_file.py::test`) in `folder`.

    Returns:
        `reports` as pytest serialises them, `problems` of its collection, and pytest's exit code.
    """
    os.chdir(folder)
    given = case_from_dict(case)
    worker = WorkerPlugin(options)
    inner = [*arguments, "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminalreporter", node]
    code = pytest.main(inner, plugins=[worker, Meter(lambda _item: given)])
    return {"reports": worker.reports, "problems": worker.problems, "exit_code": int(code)}


def case_from_dict(content: Mapping[str, Any]) -> Case:
    """The inverse of `dataclasses.asdict`."""
    records = {
        name: Record.from_dict(content[name]) if content[name] is not None else None
        for name in ("baseline", "last_pass")
    }
    gate = Gate(Tolerance(**content["gate"]["allocated"]), Tolerance(**content["gate"]["reserved"]))
    rest = {"budget": Budget(**content["budget"]), "gate": gate, "artefacts": Path(content["artefacts"])}
    return Case(**{**content, **records, **rest})
