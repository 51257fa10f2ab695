"""The tables of published figures beside virtual ones."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from published.rows import MIB, FineTuningRun, PublishedRow, Score
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

_MEASURED = "measured by others: see source"


def percent(error: float | None, digits: int = 3) -> str:
    """A relative error as a signed percentage; a dash for none."""
    return "-" if error is None else f"{error:+.{digits}%}"


def write_published(folder: Path, scores: Sequence[Score]) -> None:
    """Write `published.json`, `.md` and `.csv`."""
    errors = [abs(score.error) for score in scores if score.held and score.error is not None]
    summary = {
        "rows": len(scores),
        "rows_held_to_the_limit": len(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "rows_equal_to_the_byte_or_its_rounding": sum(error < 1e-6 for error in errors),
    }
    record = provenance_record("the card of each row", "virtual")
    headers = ("case", "card", "mode", "configuration", "x", "measured MiB", "virtual MiB", "error", "compared")
    cells = [
        [
            score.row.case,
            score.row.card,
            score.row.mode,
            _configuration(score.row),
            str(score.row.x),
            f"{score.row.measured_mib:.4f}",
            f"{score.virtual_bytes / MIB:.4f}",
            percent(score.error),
            score.compared.partition(":")[0],
        ]
        for score in scores
    ]
    excepted = sorted({f"`{s.row.case}`: {s.compared.partition(': ')[2]}" for s in scores if ": " in s.compared})
    markdown = (
        "# Published peaks and virtual ones\n\n"
        "Peak allocated memory of single PyTorch operations. **Measured** by others on real cards (Liger-Kernel's "
        "benchmark data, BSD-2-Clause; each row's date and release in the CSV), **virtual** on the same kind of card "
        "here, each row in a process of its own.\n\n"
        f"Of {summary['rows']} rows, {summary['rows_held_to_the_limit']} are held to 0.1 %: "
        f"median error {summary['median_error']:.3%}, worst {summary['worst_error']:.3%}, "
        f"{summary['rows_equal_to_the_byte_or_its_rounding']} equal.\n\n"
        f"Excepted: {'; '.join(excepted) or 'none'}.\n\n"
        f"{markdown_table(headers, cells, text_columns=4)}\n\n{provenance_lines(record)}\n"
    )
    rows = [_published_row(score) for score in scores]
    write_result(folder, "published", {"environment": record, "summary": summary, "rows": rows}, markdown, rows)


def _configuration(row: PublishedRow) -> str:
    return ", ".join(
        f"{key} {str(value).removeprefix('torch.')}"
        for key, value in row.config.items()
        if key not in ("mode", "x_name") and value is not False
    )


def _published_row(score: Score) -> dict[str, Any]:
    row = score.row
    return {
        "case": row.case,
        "x_name": row.config["x_name"],
        "x": row.x,
        "gpu": row.gpu,
        "virtual_card": row.card,
        "mode": row.mode,
        "measured_allocated_mib": row.measured_mib,
        "measured_provenance": _MEASURED,
        "virtual_allocated_bytes": score.virtual_bytes,
        "virtual_provenance": "virtual",
        "error": score.error,
        "held_to_the_limit": score.held,
        "compared": score.compared,
        "source": row.source,
        "note": row.note,
    }


def write_fine_tuning(
    folder: Path, runs: Sequence[FineTuningRun], virtual: Mapping[str, Mapping[str, int]], fitted_length: int
) -> None:
    """Write `published-finetuning.json`, `.md` and `.csv`."""
    rows = [
        {
            "experiment": run.experiment,
            "virtual_card": run.card,
            "trainable_parameters": run.trainable_parameters,
            "measured_reserved_mib": run.reserved_mib,
            "measured_provenance": _MEASURED,
            "measured_torch": run.torch,
            "measured_transformers": run.transformers,
            "virtual_reserved_bytes": virtual[run.experiment]["reserved"],
            "virtual_provenance": "virtual",
            "error": virtual[run.experiment]["reserved"] / MIB / run.reserved_mib - 1,
            "source": run.source,
        }
        for run in runs
        if run.experiment in virtual
    ]
    worst = max(abs(float(str(row["error"]))) for row in rows)
    record = provenance_record("l40s-48gb", "virtual")
    headers = ("run", "card", "trained parameters", "measured MiB", "virtual MiB", "error")
    cells = [
        [
            str(row["experiment"]),
            str(row["virtual_card"]),
            f"{row['trainable_parameters']:,}",
            f"{row['measured_reserved_mib']:.0f}",
            f"{int(str(row['virtual_reserved_bytes'])) / MIB:.0f}",
            percent(float(str(row["error"]))),
        ]
        for row in rows
    ]
    markdown = (
        "# Published fine-tuning runs and virtual ones\n\n"
        "Peak reserved memory of whole runs: Llama-3.2-3B, bf16, batch 4, no checkpointing. **Measured** by others on "
        "an L40S (PEFT's method comparison, Apache-2.0; torch 2.13.0, transformers 5.13.1), **virtual** here with the "
        f"versions below. One number is fitted, on the first row: the longest batch is {fitted_length} tokens.\n\n"
        f"Worst error {worst:.3%} of {len(rows)} runs.\n\n"
        f"{markdown_table(headers, cells, text_columns=2)}\n\n{provenance_lines(record)}\n"
    )
    content = {"environment": record, "fitted_longest_length": fitted_length, "worst_error": worst, "rows": rows}
    write_result(folder, "published-finetuning", content, markdown, rows)
