"""The end of a session: baselines recorded, and what people and machines read."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.baselines import BaselineError, baseline_path, record_baselines
from qlora_lowmem.results.kinds.verdicts import Held, Row, verdicts
from qlora_lowmem.results.style import save
from qlora_lowmem.results.tables import markdown_table, provenance_lines
from qlora_lowmem.units import MIB, format_signed

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession

_QUIET = {"PASS", "WITHIN BUDGET"}


@dataclass(frozen=True)
class Finished:
    """Lines for the terminal, and whether something at the end failed."""

    lines: tuple[str, ...]
    failed: bool


def finish(session: "GateSession", exit_status: int) -> Finished:
    """Record what was asked for, write the reports, and say so."""
    rows = sorted(session.rows, key=lambda row: row.case)
    lines, failed = _record(session, rows, exit_status)
    loud = [row for row in rows if row.verdict not in _QUIET and not row.fails and not session.recording(row.case)]
    lines += [row.message or f"{row.case}: {row.verdict}" for row in loud]
    if os.environ.get("GITHUB_ACTIONS") == "true":
        lines += annotations(rows)
    if rows:
        record = provenance_record(*_device(rows))
        _summary_of_the_job(rows, record)
        folder = session.config.getoption("vram_report")
        if folder:
            write_report(Path(folder), rows, record)
            lines.append(f"report: {folder}/gate.json, summary.md, trend.json, chart.svg")
    return Finished(tuple(lines), failed)


def _record(session: "GateSession", rows: Sequence[Row], exit_status: int) -> tuple[list[str], bool]:
    if not session.record_names:
        return [], False
    if exit_status != pytest.ExitCode.OK:
        return ["no baseline was written: the run did not pass, and --record writes those of a passing run"], False
    chosen = [row for row in rows if row.record is not None and session.recording(row.case)]
    unknown = [name for name in session.record_names if name and not any(session.matches(name, r.case) for r in chosen)]
    if unknown or not chosen:
        ran = ", ".join(row.case for row in rows) or "none"
        return [f"--record: no case of the name {', '.join(unknown) or 'given'} ran. Cases that ran: {ran}"], True
    lines: list[str] = []
    gone = {row.case for row in rows if row.verdict == "MISSING" and session.records_all}
    for device in sorted({row.record.key.device for row in chosen if row.record}):
        records = {row.case: row.record for row in chosen if row.record and row.record.key.device == device}
        path = baseline_path(session.baselines, device)
        try:
            record_baselines(path, records, forget=gone)
        except BaselineError as error:
            return [*lines, str(error)], True
        lines.append(f"recorded in {path}: {', '.join(records)}")
    return lines, False


def write_report(folder: Path, rows: Sequence[Row], record: dict[str, Any]) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": record, "cases": [row.to_dict() for row in rows]}
    for name, text in (
        ("gate.json", json.dumps(content, indent=1) + "\n"),
        ("trend.json", json.dumps(trend(rows), indent=1) + "\n"),
        ("summary.md", summary(rows, record)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    _write_chart(folder / "chart.svg", rows)


def trend(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The format `customSmallerIsBetter` of github-action-benchmark, in bytes."""
    found = []
    for row in rows:
        for what in ("allocated", "reserved") if row.record is not None else ():
            extra = f"{row.verdict} on {row.record.key.device} ({row.record.key.provenance})" if row.record else ""
            value = getattr(row.record, what)
            found.append({"name": f"{row.case}: {what}", "unit": "bytes", "value": value, "extra": extra})
    return found


def summary(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """Markdown: a table, a chart, the failures in full."""
    failing = [row for row in rows if row.fails]
    head = f"{len(failing)} of {len(rows)} cases fail" if failing else f"{len(rows)} cases, none fails"
    table = markdown_table(
        ("case", "verdict", "allocated MiB", "held against MiB", "difference", "reserved MiB", "on the card MiB"),
        [_cells(row) for row in rows],
        text_columns=2,
    )
    parts = [f"## GPU memory: {head}", table, _mermaid(rows)]
    for row in rows:
        if row.message:
            parts.append(
                f"<details{' open' if row.fails else ''}><summary>{row.case}: {row.verdict}</summary>\n\n"
                f"```\n{row.message}\n```\n\n</details>"
            )
    parts.append(provenance_lines(record))
    return "\n\n".join(part for part in parts if part) + "\n"


def annotations(rows: Sequence[Row]) -> list[str]:
    """Workflow commands of GitHub: an error for what fails, a warning for what asks for something."""
    lines = []
    for row in rows:
        if row.verdict in _QUIET:
            continue
        level = "error" if row.fails else "warning"
        properties = f"file={_escaped(row.file, True)},title={_escaped(f'GPU memory: {row.verdict}', True)}"
        lines.append(f"::{level} {properties}::{_escaped(row.message or row.case)}")
    return lines


def _escaped(text: str, in_property: bool = False) -> str:
    """As actions/toolkit (core/src/command.ts: escapeData, escapeProperty)."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text


def _cells(row: Row) -> list[str]:
    against = row.held_against
    difference = format_signed(row.judged - against) if against is not None and row.record else "-"
    sizes = [_mib(getattr(row.record, what)) if row.record else "-" for what in ("allocated", "reserved", "device")]
    return [row.case, row.verdict, sizes[0], _mib(against) if against is not None else "-", difference, *sizes[1:]]


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f}"


def _mermaid(rows: Sequence[Row]) -> str:
    """Bars are what was measured; the line is what it is held against, where every case has that."""
    shown = [row for row in rows if row.record is not None]
    if not shown:
        return ""
    names = ", ".join('"' + row.case.rpartition("::")[2].replace('"', "'") + '"' for row in shown)
    bars = ", ".join(f"{row.judged / MIB:.1f}" for row in shown)
    against = [row.held_against for row in shown]
    line = f"\n  line [{', '.join(f'{count / MIB:.1f}' for count in against if count is not None)}]"
    chart = (
        '```mermaid\nxychart-beta\n  title "Allocated peak, and what it is held against"\n'
        f'  x-axis [{names}]\n  y-axis "MiB"\n  bar [{bars}]'
    )
    return f"{chart}{line if None not in against else ''}\n```"


def _write_chart(path: Path, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row.record is not None]
    held = [Held(row.case.rpartition("::")[2], row.judged, row.held_against, row.fails) for row in shown]
    save(lambda style: verdicts(style, held), "Allocated peak, and what it is held against", path)


def _summary_of_the_job(rows: Sequence[Row], record: dict[str, Any]) -> None:
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(rows, record))


def _device(rows: Sequence[Row]) -> tuple[str, str]:
    keys = [record.key for row in rows if (record := row.record or row.baseline) is not None]
    return ", ".join(sorted({key.device for key in keys})), ", ".join(sorted({key.provenance for key in keys}))
