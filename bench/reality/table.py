"""`reality.md`, `.json` and `.csv`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result
from reality.comparison import Comparison
from reality.rows import FACTORY, FITCHECK, FMS, FMS_LATER, NOT_A_RECIPE, PEFT, UNSLOTH

# Source -> what it is and why the two figures differ.
SOURCES = {
    FMS: "TRL's SFTTrainer on an A100 80 GB, one figure from torch's counter and one from nvidia-smi (sampled). "
    "The recipe is the same job in today's versions; the LoRA runs had no autocast, which a recipe always has.",
    FMS_LATER: "The same runs in later versions. Explained: 16-bit logits beside their fp32 copy, by which the two "
    "published figures of each run differ.",
    FITCHECK: "A plain loop on a Tesla T4. Explained: it holds the model's output, so the logits, in backward. Its "
    "NF4 base passed through PEFT's prepare_model_for_kbit_training, whose fp32 a recipe comes nearest to with "
    "compute_dtype fp32. The last column is that loop itself on the virtual T4; what is left there in the NF4 rows is "
    "how from_pretrained leaves the blocks after loading. In Mistral's rows the peak is a layer's recomputation, where "
    "the recipe dequantises to fp32 and the loop to fp16.",
    FACTORY: "Published in whole GB without saying which: a figure agrees if it lies between the least of it in 10^9 "
    "and the most in 2^30. At 65,536 tokens the run was out of memory on 40 GB.",
    UNSLOTH: "Published is the longest sequence on so much memory: the plan at that length should come near to the "
    "memory. Explained, as an assumption: embeddings and LM head in fp32. Versions are not stated, nor how the smaller "
    "cards were made; a loss that keeps one more copy of the logits would explain the rest.",
    PEFT: "A loop of its own on an L40S. Explained: the last output's logits and key-value cache. Its batches are "
    "padded, so attention takes the masked kernel with keys and values repeated, and it has no autocast; the last "
    "column is that program itself (published-finetuning.md).",
}
_HEADERS = ("run", "figure", "measured MB", "plan MB", "difference", "explained MB", "left", "program itself")


def write_reality(folder: Path, comparisons: Sequence[Comparison], record: dict[str, Any]) -> None:
    """Write the tables into `folder`; `record` is their provenance."""
    sections = []
    for source, about in SOURCES.items():
        cells = [_cells(each) for each in comparisons if each.row.source == source]
        sections.append(f"## {source}\n\n{about}\n\n{markdown_table(_HEADERS, cells, text_columns=2)}\n")
    left_out = markdown_table(("published", "why it is no recipe"), [list(each) for each in NOT_A_RECIPE], 2)
    summary = _summary(comparisons)
    markdown = (
        "# Published fine-tuning peaks and the plan's\n\n"
        "Each published run is written as a recipe, and the recipe run on a virtual card of the kind it was measured "
        "on: *plan* is that figure, *measured* what others measured (sources and licences: bench/reality/README.md). "
        "*Explained* are bytes that the measured program keeps, by its description, and a recipe does not; *left* is "
        "the difference with them. MB are 10^6 bytes. Weights are random and of the same shapes.\n\n"
        f"{summary['text']}\n\n{chr(10).join(sections)}\n## Not a recipe\n\n{left_out}\n\n{provenance_lines(record)}\n"
    )
    rows = [each.to_dict() for each in comparisons]
    content = {"environment": record, "summary": summary["figures"], "rows": rows}
    write_result(folder, "reality", content, markdown, rows)


def _summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    allocated = [each for each in comparisons if each.row.measures == "allocated"]
    left = [abs(each.left) for each in allocated if each.left is not None]
    program = [abs(each.program_difference) for each in comparisons if each.program_difference is not None]
    rounded = [each.agrees for each in comparisons if each.agrees is not None]
    figures = {
        "rows": len(comparisons),
        "allocated_rows": len(allocated),
        "worst_difference": max(abs(each.difference) for each in allocated if each.difference is not None),
        "worst_left": max(left),
        "rows_left_within_one_percent": sum(share <= 0.01 for share in left),
        "programs": len(program),
        "worst_program_difference": max(program),
        "programs_equal": sum(
            each.program is not None and each.program[each.row.measures] == each.row.measured_bytes
            for each in comparisons
        ),
        "rounded_rows": len(rounded),
        "rounded_rows_that_agree": sum(rounded),
    }
    text = (
        f"{figures['rows']} figures. Of {figures['allocated_rows']} allocated peaks the plan differs by "
        f"{figures['worst_difference']:.1%} at most, by {figures['worst_left']:.1%} once what is explained is added, "
        f"and {figures['rows_left_within_one_percent']} are within 1 % then. {figures['rounded_rows_that_agree']} of "
        f"{figures['rounded_rows']} figures in whole GB agree. Of {figures['programs']} measured programs run "
        f"themselves, {figures['programs_equal']} are equal to the byte, and the worst differs by "
        f"{figures['worst_program_difference']:.2%}."
    )
    return {"figures": figures, "text": text}


def _cells(each: Comparison) -> list[str]:
    row = each.row
    versions = f" ({row.versions.split(',')[0]})" if row.source == FITCHECK else ""
    return [
        row.run + versions,
        row.measures,
        _megabytes(row.measured_bytes),
        _megabytes(each.plan_bytes),
        _percent(each.difference) if each.agrees is None or each.difference is not None else _agrees(each),
        _megabytes(each.explained) if each.explained else "-",
        _agrees(each) if each.agrees is not None and each.difference is not None else _percent(each.left),
        _percent(each.program_difference),
    ]


def _agrees(each: Comparison) -> str:
    return "agrees" if each.agrees else "does not agree"


def _megabytes(count: int) -> str:
    return f"{count / 10**6:,.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.2%}"
