"""What people and machines read of a session: JSON, a trend, Markdown, a chart, annotations."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.files import write_whole
from qlora_lowmem.gate.verdicts import QUIET
from qlora_lowmem.results.kinds.verdicts import Row, verdicts, verdicts_table
from qlora_lowmem.results.style import save
from qlora_lowmem.results.tables import provenance_lines
from qlora_lowmem.units import MIB

_CHART = "Allocated peak, and what it is held against"


def publish(rows: Sequence[Row], folder: str | None) -> list[str]:
    """Write the reports to `folder`, and what a job of GitHub Actions shows; returns lines for the terminal."""
    lines = annotations(rows) if os.environ.get("GITHUB_ACTIONS") == "true" else []
    if not rows:
        return lines
    keys = [found.key for row in rows if (found := row.record or row.baseline) is not None]
    device, provenance = (", ".join(sorted({getattr(key, name) for key in keys})) for name in ("device", "provenance"))
    record = provenance_record(device, provenance)
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(summary(rows, record))
        except OSError as error:
            lines.append(f"GITHUB_STEP_SUMMARY: {path!r} cannot be written ({error.strerror or error})")
    if folder:
        try:
            write_report(Path(folder), rows, record)
        except OSError as error:
            why = error.strerror or str(error)
            lines.append(f"--vram-report: {folder!r} cannot be written ({why}); this is its summary")
            lines += summary(rows, record).splitlines()
        else:
            lines.append(f"report: {folder}/gate.json, summary.md, trend.json, chart.svg")
    return lines


def write_report(folder: Path, rows: Sequence[Row], record: dict[str, Any]) -> None:
    """Write everything into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": record, "cases": msgspec.to_builtins(rows)}
    for name, text in (
        ("gate.json", json.dumps(content, indent=1) + "\n"),
        ("trend.json", json.dumps(trend(rows), indent=1) + "\n"),
        ("summary.md", summary(rows, record)),
    ):
        write_whole(folder / name, text)
    shown = [row for row in rows if row.record is not None]
    where = "{device} ({provenance})".format_map(record)
    save(lambda style: verdicts(style, shown), f"{_CHART}: {where}", folder / "chart.svg")


def trend(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The format `customSmallerIsBetter` of github-action-benchmark, in bytes, and launches where they were counted."""
    found: list[dict[str, Any]] = []
    for row, record in ((row, row.record) for row in rows if row.record is not None):
        extra = f"{row.verdict} on {record.key.device} ({record.key.provenance})"
        for what, value in (("allocated", record.allocated), ("reserved", record.reserved)):
            found.append({"name": f"{row.case}: {what}", "unit": "bytes", "value": value, "extra": extra})
        if record.launches is not None:
            name, count = f"{row.case}: launches", record.launches
            found.append({"name": name, "unit": "launches", "value": count, "extra": extra})
    return found


def summary(rows: Sequence[Row], record: dict[str, Any]) -> str:
    """Markdown: a table, a chart, the failures in full."""
    failing = [row for row in rows if row.fails]
    head = f"{len(failing)} of {len(rows)} cases fail" if failing else f"{len(rows)} cases, none fails"
    parts = [f"## GPU memory: {head}", verdicts_table(rows), _mermaid(rows)]
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
        if row.verdict in QUIET:
            continue
        level = "error" if row.fails else "warning"
        properties = f"file={_escaped(row.file, True)},title={_escaped(f'GPU memory: {row.verdict}', True)}"
        lines.append(f"::{level} {properties}::{_escaped(row.message or row.case)}")
    return lines


def _escaped(text: str, in_property: bool = False) -> str:
    """As actions/toolkit (core/src/command.ts: escapeData, escapeProperty)."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text


def _mermaid(rows: Sequence[Row]) -> str:
    """Bars are what was measured; the line is what it is held against, where every case has that."""
    shown = [row for row in rows if row.record is not None]
    if not shown:
        return ""
    names = ", ".join('"' + row.name.replace('"', "'") + '"' for row in shown)
    bars = ", ".join(f"{row.judged / MIB:.1f}" for row in shown)
    against = [row.held_against for row in shown]
    line = f"\n  line [{', '.join(f'{count / MIB:.1f}' for count in against if count is not None)}]"
    chart = f'```mermaid\nxychart-beta\n  title "{_CHART}"\n  x-axis [{names}]\n  y-axis "MiB"\n  bar [{bars}]'
    return f"{chart}{line if None not in against else ''}\n```"
