"""Measure budgeted tests in the process that runs them: a worker on a virtual card, or this one with --gpu."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lowmem.gate.artefacts import keep
from qlora_lowmem.gate.budget import over_budget
from qlora_lowmem.gate.environment_key import allocator_of_environment, key_of
from qlora_lowmem.gate.keys import ROW
from qlora_lowmem.gate.records import record_of
from qlora_lowmem.gate.verdicts import Gate, Regressed, compare
from qlora_lowmem.results.kinds.verdicts import Budget, Record, Row


@dataclass(frozen=True)
class Case:
    """A budgeted test, and what it is held against.

    Attributes:
        name: the test's node id.
        baseline: its recorded peak, if there is one.
        last_pass: what it used when it last passed here, if that is known.
        gate: tolerances against the baseline.
        recording: a baseline is about to be replaced, so it does not fail the test.
        artefacts: a folder for what failing runs leave.
    """

    name: str
    budget: Budget
    baseline: Record | None
    last_pass: Record | None
    gate: Gate
    recording: bool
    across_versions: bool
    report_only: bool
    artefacts: Path


class Meter:
    """A plugin that measures tests and fails those over their budget or their baseline.

    Args:
        case_of: the case of a test; None for a test that is not measured.
    """

    def __init__(self, case_of: Callable[[pytest.Item], Case | None]) -> None:
        self._case_of = case_of
        self._recorder: Any = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fixtures count: models are often made in them."""
        if self._case_of(item) is not None:
            from qlora_lowmem.memory.recorder import ProgramRecorder

            self._recorder = ProgramRecorder(item.config.rootpath)
            self._recorder.start()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Read the peak as the body ends, and judge it if the body passed."""
        case = self._case_of(item)
        if case is None:
            return (yield)
        try:
            result = yield
        except BaseException as error:
            self._explain_out_of_memory(item, error)
            raise
        measurement, self._recorder = self._recorder.stop(), None
        self._judge(item, case, measurement)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Nothing goes on being recorded after a test that did not reach its body."""
        del item
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        return (yield)

    def _judge(self, item: pytest.Item, case: Case, measurement: Any) -> None:
        key = key_of(measurement.profile.device, measurement.profile.provenance, allocator_of_environment())
        record = record_of(key, measurement.profile, measurement.attribution)
        reference, name = case.last_pass, "it last passed"
        if case.baseline is not None and not case.baseline.key.differences(key):
            reference, name = case.baseline, "its baseline"
        failure = over_budget(
            case.name, case.budget, record, measurement.attribution, reference=reference, reference_name=name
        )
        verdict = compare(case.name, case.baseline, record, case.gate, across_versions=case.across_versions)
        regressed = verdict.fails and not case.recording
        left: tuple[str, ...] = ()
        if failure is not None or regressed:
            left = keep(case.artefacts, case.name, measurement.attribution, measurement.snapshot)
        name = "WITHIN BUDGET" if case.baseline is None else verdict.name
        row = Row(case.name, item.location[0], name, record, case.baseline, case.budget, artefacts=left)
        if failure is not None:
            failure = replace(failure, artefacts=left)
            row = replace(row, verdict="OVER BUDGET", fails=True, message=failure.render())
        elif case.baseline is not None and verdict.name != "PASS":
            if isinstance(verdict, Regressed):
                verdict = replace(verdict, artefacts=left)
            row = replace(row, fails=regressed and not case.report_only, message=verdict.render())
        item.stash[ROW] = row
        for name, value in row.properties():
            item.user_properties.append((name, value))
        if row.fails:
            pytest.fail(row.message, pytrace=False)

    def _explain_out_of_memory(self, item: pytest.Item, error: BaseException) -> None:
        """What the card held when it ran out, beside the test's own error."""
        measurement, self._recorder = self._recorder.stop(), None
        import torch

        found = measurement.attribution
        if isinstance(error, torch.OutOfMemoryError) and found is not None:
            from qlora_lowmem.results.kinds.attribution_table import headline, owners_table

            item.add_report_section("call", "gpu memory", f"{headline(found)}\n\n{owners_table(found, limit=5)}")
