"""A case of a matrix held against its baseline, attributed where the answer needs it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_lowmem.gate.artefacts import keep, snapshot_path
from qlora_lowmem.gate.records import attributed
from qlora_lowmem.gate.verdicts import Missing, Regressed, Verdict, compare
from qlora_lowmem.results.kinds.verdicts import Record, Row

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession
    from qlora_lowmem.memory.attribution import Attribution


def check_case(
    session: "GateSession",
    item: pytest.Item,
    case: str,
    record: Record,
    attribute: "Callable[[Path | None], Attribution | None]",
) -> tuple[Verdict, Row]:
    """The verdict on a case and its row.

    Args:
        attribute: runs the case again with attribution, and writes the allocator's snapshot to the path that it gets;
            called only where the verdict fails or is recorded.
    """
    baseline = session.baseline(record.key.device, case)
    gate, recording = session.gate(), session.recording(case)
    verdict = compare(case, baseline, record, gate, across_versions=session.across_versions)
    left: tuple[str, ...] = ()
    if verdict.fails or recording:
        session.artefacts.mkdir(parents=True, exist_ok=True)
        attribution = attribute(None if recording else snapshot_path(session.artefacts, case))
        if attribution is not None:
            record = attributed(record, attribution)
            verdict = compare(case, baseline, record, gate, across_versions=session.across_versions)
        if not recording:
            left = keep(session.artefacts, case, attribution)
    if isinstance(verdict, Regressed):
        verdict = replace(verdict, artefacts=left)
    fails = verdict.fails and not recording and not session.report_only
    message = "" if verdict.name == "PASS" else verdict.render()
    return verdict, Row(
        case, item.location[0], verdict.name, record, baseline, fails=fails, message=message, artefacts=left
    )


def missing_rows(session: "GateSession", item: pytest.Item, device: str, cases: set[str]) -> list[Row]:
    """A row for every recipe of the device's baselines that is none of `cases`. Tests' budgets are not looked at."""
    rows = []
    for name in sorted(session.recorded(device) - cases):
        baseline = session.baseline(device, name)
        if "::" in name or baseline is None:
            continue
        fails = not session.report_only and not session.records_all
        verdict = Missing(name, baseline)
        rows.append(Row(name, item.location[0], verdict.name, None, baseline, fails=fails, message=verdict.render()))
    return rows
