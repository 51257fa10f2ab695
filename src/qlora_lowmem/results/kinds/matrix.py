"""The comparison table of a benchmark run: one row a recipe, one set of files a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.memory.profile import MemoryProfile, Provenance
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.results.tables import FLOOR_TEXT, gib, markdown_table, provenance_lines, times_floor, write_result


@dataclass(frozen=True)
class CaseResult:
    """What a recipe came to on a card.

    Attributes:
        fits: it trained on the card itself, within the memory that a job can count on there (`Card.usable_bytes`).
        profile: its peaks there; where it does not fit, the peaks with more room (a virtual card of the same kind with
            room for it; a real one without the cap), which say what it would need; None if that failed too.
        out_of_memory: torch's message, if it ran out on the card.
        failure: any other failure.
        floor_bytes: what no method of training the recipe avoids (`memory.owners`).
    """

    recipe: Recipe
    card: str
    provenance: Provenance
    fits: bool
    profile: MemoryProfile | None
    out_of_memory: str | None = None
    failure: str | None = None
    trainable_parameters: int = 0
    floor_bytes: int = 0

    @property
    def recipe_hash(self) -> str:
        """Equal hashes are the same training job."""
        return recipe_hash(self.recipe)


_HEADERS = (
    "recipe",
    "card",
    "r",
    "targets",
    "seq",
    "batch",
    "ckpt",
    "loss",
    "load",
    "first step",
    "steady",
    "allocated",
    "floor",
    "x floor",
    "reserved",
    "on the card",
    "verdict",
)


def write_matrix(folder: Path, results: Sequence[CaseResult], record: dict[str, Any], name: str = "matrix") -> None:
    """Write the table of `results` under `folder` as JSON, Markdown and CSV, with its provenance."""
    rows = [_flat(result) for result in results]
    table = markdown_table(_HEADERS, [_cells(result) for result in results], text_columns=2)
    markdown = (
        f"# {record['device']}\n\n"
        "Peaks in GiB: allocated (by phase, then overall), reserved, and what the card must hold with the CUDA "
        f"context. {FLOOR_TEXT} A recipe that does not fit is run again where it has room, on a virtual card of the "
        "same kind with room for it or on the real one without a cap: its figures are what it would need.\n\n"
        f"{table}\n\n{provenance_lines(record)}\n"
    )
    content = {"environment": record, "device": record["device"], "provenance": record["provenance"], "cases": rows}
    write_result(folder, name, content, markdown, [{k: v for k, v in row.items() if k != "phases"} for row in rows])


def _flat(result: CaseResult) -> dict[str, Any]:
    recipe, profile = result.recipe, result.profile
    targets = recipe.lora.target_modules
    row: dict[str, Any] = {
        "recipe": recipe.name,
        "recipe_hash": result.recipe_hash,
        "device": result.card,
        "provenance": profile.provenance if profile else result.provenance,
        "fits": result.fits,
        "lora_r": recipe.lora.lora_r,
        "target_modules": targets if isinstance(targets, str) else " ".join(targets),
        "max_seq_length": recipe.batch.max_seq_length,
        "batch_size": recipe.batch.batch_size,
        "gradient_accumulation_steps": recipe.batch.gradient_accumulation_steps,
        "gradient_checkpointing": recipe.memory.gradient_checkpointing,
        "loss": recipe.memory.loss,
        "trainable_parameters": result.trainable_parameters,
        "peak_allocated_bytes": profile.peak_allocated_bytes if profile else 0,
        "peak_reserved_bytes": profile.peak_reserved_bytes if profile else 0,
        "peak_device_bytes": profile.peak_device_bytes if profile else 0,
        "floor_bytes": result.floor_bytes,
        "out_of_memory": result.out_of_memory or "",
        "phases": profile.to_dict()["phases"] if profile else [],
    }
    return row


def _cells(result: CaseResult) -> list[str]:
    recipe, profile = result.recipe, result.profile
    targets = recipe.lora.target_modules
    if profile is None:
        reason = (
            "does not fit: out of memory"
            if result.out_of_memory
            else f"failed: {(result.failure or '').strip().splitlines()[-1]}"
        )
        return [recipe.name, result.card, *[""] * (len(_HEADERS) - 3), reason]
    by_phase = {name: gib(peak.allocated) for name, peak in profile.phases.items()}
    return [
        recipe.name,
        result.card,
        str(recipe.lora.lora_r),
        targets if isinstance(targets, str) else ", ".join(targets),
        str(recipe.batch.max_seq_length),
        f"{recipe.batch.batch_size} x {recipe.batch.gradient_accumulation_steps}",
        "yes" if recipe.memory.gradient_checkpointing else "no",
        recipe.memory.loss,
        *(by_phase.get(name, "-") for name in ("load", "first step", "steady")),
        gib(profile.peak_allocated_bytes),
        gib(result.floor_bytes),
        times_floor(profile.peak_allocated_bytes, result.floor_bytes),
        gib(profile.peak_reserved_bytes),
        gib(profile.peak_device_bytes),
        "fits" if result.fits else f"does not fit: needs {gib(profile.peak_device_bytes)}",
    ]
