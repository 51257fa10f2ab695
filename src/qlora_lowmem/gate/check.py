"""A case of a matrix held against its baseline, attributed where the answer needs it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qlora_lowmem.gate.artefacts import keep_attribution
from qlora_lowmem.gate.records import Record, attributed
from qlora_lowmem.gate.rows import Row
from qlora_lowmem.gate.verdicts import Missing, Regressed, Verdict, compare

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession
    from qlora_lowmem.memory.attribution import Attribution


def check_case(
    session: "GateSession",
    item: pytest.Item,
    case: str,
    record: Record,
    attribute: "Callable[[], Attribution | None]",
) -> tuple[Verdict, Row]:
    """The verdict on a case and its row. `attribute` runs it again, and only where the verdict fails or is recorded."""
    baseline = session.baseline(record.key.device, case)
    gate, recording = session.gate(), session.recording(case)
    verdict = compare(case, baseline, record, gate, across_versions=session.across_versions)
    artefact = ""
    if verdict.fails or recording:
        attribution = attribute()
        if attribution is not None:
            record = attributed(record, attribution)
            verdict = compare(case, baseline, record, gate, across_versions=session.across_versions)
        if not recording:
            artefact = keep_attribution(session.artefacts, case, attribution)
    if isinstance(verdict, Regressed):
        verdict = replace(verdict, artefact=artefact)
    fails = verdict.fails and not recording and not session.report_only
    message = "" if verdict.name == "PASS" else verdict.render()
    return verdict, Row(
        case, str(item.path), verdict.name, record, baseline, fails=fails, message=message, artefact=artefact
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
        rows.append(Row(name, str(item.path), verdict.name, None, baseline, fails=fails, message=verdict.render()))
    return rows
