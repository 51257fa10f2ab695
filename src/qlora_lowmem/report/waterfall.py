"""From the baseline to lean, one idea a step: what each saves, as a table and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.report.tables import gib, markdown_table, provenance_lines, write_result
from qlora_lowmem.units import GIB


@dataclass(frozen=True)
class Step:
    """One idea more than the step before.

    Attributes:
        idea: what changed, in the recipe's words.
        peak_allocated_bytes, peak_device_bytes, floor_bytes: of the recipe with it.
    """

    idea: str
    peak_allocated_bytes: int
    peak_device_bytes: int
    floor_bytes: int


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
                f"{step.peak_allocated_bytes / step.floor_bytes:.2f}",
            ]
        )
    headers = ["idea", "allocated", "saves", "on the card", "floor", "x floor"]
    markdown = (
        "# From the baseline to lean\n\nGranite-4.0-H-1B, peaks in GiB, one idea more a row; a negative saving is what "
        "training more layers costs. The floor is what no method avoids: weights as stored, adapters with their state, "
        f"two residual tensors.\n\n{markdown_table(headers, cells)}\n\n![waterfall](waterfall.svg)\n\n"
        f"{provenance_lines(record)}\n"
    )
    content = {"environment": record, "device": record["device"], "provenance": record["provenance"], "cases": rows}
    write_result(folder, "waterfall", content, markdown, rows)
    _draw(steps, record, folder / "waterfall.svg", folder / "waterfall.png")


def _draw(steps: Sequence[Step], record: dict[str, Any], *paths: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    peaks = [step.peak_allocated_bytes / GIB for step in steps]
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "qlora_lowmem"}):
        figure = Figure(figsize=(9, 0.42 * len(steps) + 1.4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        lines = range(len(steps))
        axes.barh(lines, peaks, color="#332288", label="allocated")
        for line, (step, peak) in enumerate(zip(steps, peaks, strict=True)):
            floor = step.floor_bytes / GIB
            axes.plot([floor, floor], [line - 0.4, line + 0.4], color="#DDCC77", linewidth=3)
            axes.text(peak * 1.03, line, f"{peak:.3f}", va="center")
        axes.plot([], [], color="#DDCC77", linewidth=3, label="floor")
        axes.set_xscale("log")
        axes.set_xlim(0.5, max(peaks) * 1.6)
        axes.set_xticks([0.5, 1, 2, 6, 12, 24], ["0.5", "1", "2", "6", "12", "24"])
        axes.axvline(6, color="#882255", linewidth=1, linestyle="--")
        axes.text(6.1, -0.7, "6 GiB card", color="#882255", va="bottom")
        axes.set_yticks(lines, [step.idea for step in steps])
        axes.invert_yaxis()
        axes.set_xlabel(f"peak allocated, GiB, log scale ({record['provenance']}, {record['device']})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False)
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
