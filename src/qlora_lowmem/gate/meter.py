"""Measure budgeted tests in the process that runs them: a worker on a virtual card, or this one with --vram-gpu."""

import json
import re
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from qlora_lowmem.environment import versions
from qlora_lowmem.files import write_whole
from qlora_lowmem.gate import REPORT_ATTRIBUTE
from qlora_lowmem.gate.budget import over_budget, too_many_launches
from qlora_lowmem.gate.records import allocator_of_environment, key_of, record_of
from qlora_lowmem.gate.verdicts import ALWAYS, Gate, Verdict, compare, not_counted
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.results.kinds.verdicts import Budget, Record, Row
from qlora_lowmem.scratch import scratch_folder
from qlora_lowmem.units import format_bytes

if TYPE_CHECKING:
    from qlora_lowmem.memory.recorder import Measurement, ProgramRecorder
    from qlora_lowmem.virtual_gpu.together import Together

_ROW: pytest.StashKey[Row] = pytest.StashKey()


@dataclass(frozen=True)
class Case:
    """What is judged, and what it is held against.

    Attributes:
        name: a test's node id, or a recipe's name.
        budget: its limit; None for a recipe.
        baseline: its recorded peak, if there is one.
        last_pass: what it used when it last passed here, if that is known.
        gate: tolerances against the baseline.
        recording: a baseline is about to be replaced, so it does not fail the test.
        artefacts: path of a folder for what failing runs leave; made by whoever writes there.
    """

    name: str
    budget: Budget | None
    baseline: Record | None
    last_pass: Record | None
    gate: Gate
    recording: bool
    across_versions: bool
    report_only: bool
    artefacts: str

    @property
    def snapshot_path(self) -> Path:
        """Where the allocator's snapshot belongs; https://pytorch.org/memory_viz opens it."""
        return Path(self.artefacts) / f"snapshot-{self._file_name}.pickle"

    def verdict(self, record: Record) -> Verdict:
        """The record held against the baseline; a budgeted test may have none."""
        if self.budget is not None and self.baseline is None:
            return Verdict("WITHIN BUDGET")
        return compare(self.name, self.baseline, record, self.gate, across_versions=self.across_versions)

    def keep(self, attribution: Attribution | None, snapshot: dict[str, Any] | None = None) -> tuple[str, ...]:
        """Write what there is, and return the files of the case: these and a snapshot that lies there already."""
        kept = []
        Path(self.artefacts).mkdir(parents=True, exist_ok=True)
        if attribution is not None:
            path = Path(self.artefacts) / f"attribution-{self._file_name}.json"
            content = {"case": self.name, "attribution": msgspec.to_builtins(attribution)}
            write_whole(path, json.dumps(content, indent=1))
            kept.append(str(path))
        if snapshot is not None:
            from qlora_lowmem.memory.recorder import snapshot_file

            write_whole(self.snapshot_path, snapshot_file(snapshot))
        if self.snapshot_path.is_file():
            kept.append(str(self.snapshot_path))
        return tuple(kept)

    def row(self, item: pytest.Item, record: Record, verdict: Verdict, left: tuple[str, ...]) -> Row:
        """What came of it in the test `item`, with files that a failing run left. A budget always holds."""
        fails = verdict.name in ALWAYS or (verdict.fails and not self.recording and not self.report_only)
        file, message = item.location[0], verdict.render(left)
        return Row(self.name, file, verdict.name, record, self.baseline, self.budget, fails, message, left)

    @property
    def _file_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-")


def settle(item: pytest.Item, row: Row) -> None:
    """Put the row on the test's report, and fail the test if the row says so."""
    item.stash[_ROW] = row
    item.user_properties.extend(row.properties())
    if row.fails:
        pytest.fail(row.message, pytrace=False)


class Meter:
    """A plugin that measures the tests that have a case here, and fails those over their budget or their baseline."""

    def __init__(self, case_of: Callable[[pytest.Item], Case | None]) -> None:
        self._case_of = case_of
        self._recorder: ProgramRecorder | None = None
        self._after = ExitStack()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fixtures count: models are often made in them.

        What the test compiles goes to a cache of its own: a compilation takes memory that a warm cache would save, so
        that a peak would depend on what ran before.
        """
        if self._case_of(item) is not None:
            from qlora_lowmem.memory.recorder import ProgramRecorder

            environment = self._after.enter_context(pytest.MonkeyPatch.context())
            environment.setenv("TORCHINDUCTOR_CACHE_DIR", str(self._after.enter_context(scratch_folder())))
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
            _explain_out_of_memory(item, error, self._stop().attribution)
            raise
        settle(item, _judged(item, case, self._stop()))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Nothing goes on being recorded after a test that did not reach its body."""
        del item
        if self._recorder is not None:
            self._stop()
        with self._after:
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """The report of a judged test carries its row."""
        report = yield
        row = item.stash.get(_ROW, None)
        if row is not None and call.when == "call":
            setattr(report, REPORT_ATTRIBUTE, msgspec.to_builtins(row))
        return report

    def _stop(self) -> "Measurement":
        assert self._recorder is not None
        recorder, self._recorder = self._recorder, None
        return recorder.stop()


def _explain_out_of_memory(item: pytest.Item, error: BaseException, found: Attribution | None) -> None:
    """What the card held when it ran out, beside the test's own error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) and found is not None:
        from qlora_lowmem.results.kinds.attribution import headline, owners_table

        item.add_report_section("call", "gpu memory", f"{headline(found)}\n\n{owners_table(found, limit=5)}")


def _judged(item: pytest.Item, case: Case, measurement: "Measurement") -> Row:
    assert case.budget is not None
    profile, attribution = measurement.profile, measurement.attribution
    key = key_of(profile.device, profile.provenance, allocator_of_environment(), versions())
    record = record_of(key, profile, attribution)
    reference, name = case.last_pass, "it last passed"
    if case.baseline is not None and not case.baseline.key.differences(key):
        reference, name = case.baseline, "its baseline"
    launches = case.budget.launches
    if measurement.uncounted:
        verdict = not_counted(case.name, record, measurement.uncounted)
    elif case.budget.used(record) > case.budget.limit:
        verdict = over_budget(case.name, case.budget, record, attribution, reference, name)
    elif launches is not None and record.launches is not None and record.launches > launches:
        verdict = too_many_launches(case.name, record, launches, reference, name)
    else:
        verdict = case.verdict(record)
    if verdict.found and measurement.together is not None:
        verdict = replace(verdict, found=f"{verdict.found}\n\n{_shares(measurement.together)}")
    wrong = verdict.name in ALWAYS or (verdict.fails and not case.recording)
    return case.row(item, record, verdict, case.keep(attribution, measurement.snapshot) if wrong else ())


def _shares(found: "Together") -> str:
    """Of whom a peak is, where it is that of several processes."""
    others = found.allocated - found.allocated_here
    return (
        f"{found.others} other process{'es' if found.others > 1 else ''} of the test used the card: of what was "
        f"allocated at the peak, {format_bytes(found.allocated_here)} were held here, {format_bytes(others)} there"
    )
