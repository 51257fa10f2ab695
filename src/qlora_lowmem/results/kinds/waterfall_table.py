"""From the baseline to lean, one idea a step: what each saves, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lowmem.results.kinds.waterfall import Step, waterfall
from qlora_lowmem.results.style import save
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    gib,
    markdown_table,
    provenance_lines,
    times_floor,
    usable_bytes,
    write_result,
)


def write_waterfall(folder: Path, steps: Sequence[Step], record: dict[str, Any]) -> None:
    """Write `waterfall` under `folder` as JSON, Markdown, CSV, SVG and PNG."""
    rows, cells = [], []
    before = 0
    for step in steps:
        saved = before - step.peak_allocated_bytes if before else 0
        before = step.peak_allocated_bytes
        rows.append(
            {
                "idea": step.idea,
                "peak_allocated_bytes": step.peak_allocated_bytes,
                "saves_bytes": saved,
                "peak_device_bytes": step.peak_device_bytes,
                "floor_bytes": step.floor_bytes,
            }
        )
        cells.append(
            [
                step.idea,
                gib(step.peak_allocated_bytes),
                gib(saved),
                gib(step.peak_device_bytes),
                gib(step.floor_bytes),
                times_floor(step.peak_allocated_bytes, step.floor_bytes),
            ]
        )
    headers = ["idea", "allocated", "saves", "on the card", "floor", "x floor"]
    markdown = (
        "# From the baseline to lean\n\nGranite-4.0-H-1B, peaks in GiB, one idea more a row; a negative saving is what "
        f"training more layers costs. {FLOOR_TEXT}\n\n{markdown_table(headers, cells)}\n\n"
        "![waterfall](waterfall.svg)\n\n"
        f"{provenance_lines(record)}\n"
    )
    content = {"environment": record, "device": record["device"], "provenance": record["provenance"], "cases": rows}
    write_result(folder, "waterfall", content, markdown, rows)
    usable = usable_bytes(str(record["device"]))
    paths = (folder / "waterfall.svg", folder / "waterfall.png")
    save(lambda style: waterfall(style, steps, usable), "From the baseline to lean", *paths)
