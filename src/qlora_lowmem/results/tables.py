"""Rows of figures as Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qlora_lowmem.files import write_whole
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.units import GIB, format_bytes

# For the text of a table that has the column.
FLOOR_TEXT = "The floor is what no method avoids: weights as stored, adapters with their state, two residual tensors."


def gib(count: int) -> str:
    """Bytes as GiB with three decimals, for a table whose heading names the unit."""
    return f"{count / GIB:.3f}"


def known_gib(count: int) -> str:
    """The same, with a dash for 0, which stands for not known."""
    return gib(count) if count else "-"


def times_floor(allocated_bytes: int, floor_bytes: int) -> str:
    """An allocated peak as a multiple of its floor, with a dash where either is 0, which stands for not known."""
    return f"{allocated_bytes / floor_bytes:.2f}" if allocated_bytes and floor_bytes else "-"


def floor_lines(allocated_bytes: int, floor_bytes: int) -> tuple[str, str]:
    """The floor and the allocated peak as a multiple of it, for a terminal; `floor_bytes` is known, so not 0."""
    return (
        f"floor {format_bytes(floor_bytes)} (weights, adapters with their state, two residual tensors)",
        f"allocated is {times_floor(allocated_bytes, floor_bytes)} times the floor",
    )


def phase_table(profile: MemoryProfile) -> str:
    """Peaks by phase, in GiB, as text for a terminal."""
    rows = [[name, gib(peak.allocated), gib(peak.reserved), gib(peak.device)] for name, peak in profile.phases.items()]
    rows.append(
        ["peak", gib(profile.peak_allocated_bytes), gib(profile.peak_reserved_bytes), gib(profile.peak_device_bytes)]
    )
    table = tabulate(
        rows,
        headers=[f"{profile.device} ({profile.provenance})", "allocated GiB", "reserved GiB", "with context GiB"],
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    return f"\n{table}\n(card: {gib(profile.total_bytes)} GiB)"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A GitHub table; the first `text_columns` columns are text, the rest figures."""
    align = ["left" if index < text_columns else "right" for index in range(len(headers))]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)


def provenance_lines(record: dict[str, Any]) -> str:
    """The origin of a table's figures, as a paragraph under it."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"Figures are **{record['provenance']}** on `{record['device']}` (driver: {record['driver']}). "
        f"Versions: {packages}. Commit `{record['commit']}`, `{record['command']}`, {record['date']}."
    )


def write_result(
    folder: Path, name: str, content: dict[str, Any], markdown: str, rows: Sequence[dict[str, Any]]
) -> None:
    """Write `name`.json (the source), `name`.md and `name`.csv into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for suffix, body in ((".json", json.dumps(content, indent=2) + "\n"), (".md", markdown), (".csv", text.getvalue())):
        write_whole(folder / f"{name}{suffix}", body)
