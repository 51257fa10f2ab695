"""Predicted beside measured: the same recipe on a GPU and on its virtual twin, by phase and by kind of reading."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.results.tables import gib, markdown_table, provenance_lines, write_result

Reading = Literal["allocated", "reserved", "device"]
READINGS: tuple[Reading, ...] = ("allocated", "reserved", "device")
# The peak over all phases, beside the phases themselves.
WHOLE_RUN = "whole run"
# By how many per cent a prediction of the whole run may be off. What a card holds has its context in it, which is
# measured, not predicted, so it has no limit of its own.
LIMITS: dict[Reading, int] = {"allocated": 1, "reserved": 3}


@dataclass(frozen=True)
class Figure:
    """One reading of one recipe in one phase, predicted and measured, in bytes."""

    recipe: str
    phase: str
    reading: Reading
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Predicted over measured, less 1: above 0, too much was predicted."""
        return self.predicted / self.measured - 1

    def within(self, percent: int) -> bool:
        """Whether the error is at most that; in integers, so that the limit itself is within."""
        return abs(self.predicted - self.measured) * 100 <= percent * self.measured


@dataclass(frozen=True)
class Miss:
    """A prediction outside of its limit, in per cent; renders itself."""

    figure: Figure
    limit: int

    def __str__(self) -> str:
        f = self.figure
        return (
            f"{f.recipe}: {f.reading} over the {f.phase} predicted {f.predicted:,} bytes, measured {f.measured:,}: "
            f"{f.error:+.2%}, and the limit is {self.limit} %"
        )


def compare(recipe: str, predicted: MemoryProfile, measured: MemoryProfile) -> list[Figure]:
    """Every reading of every phase that both have, then of the whole run.

    Raises:
        ValueError: `predicted` is not virtual; the two have no phase in common.
    """
    if predicted.provenance != "virtual":
        raise ValueError(f"{recipe}: the predicted profile is {predicted.provenance}; it must be virtual")
    common = [phase for phase in measured.phases if phase in predicted.phases]
    if not common:
        raise ValueError(f"{recipe}: the two profiles have no phase in common")
    pairs = [(phase, predicted.phases[phase], measured.phases[phase]) for phase in common]
    figures = [
        Figure(recipe, phase, reading, getattr(one, reading), getattr(other, reading))
        for phase, one, other in pairs
        for reading in READINGS
    ]
    whole = [
        Figure(recipe, WHOLE_RUN, reading, getattr(predicted.peak, reading), getattr(measured.peak, reading))
        for reading in READINGS
    ]
    return figures + whole


def misses(figures: Iterable[Figure]) -> list[Miss]:
    """Whole-run readings that are outside of `LIMITS`."""
    return [
        Miss(figure, LIMITS[figure.reading])
        for figure in figures
        if figure.phase == WHOLE_RUN and figure.reading in LIMITS and not figure.within(LIMITS[figure.reading])
    ]


def write_prediction(
    folder: Path, figures: Sequence[Figure], record: dict[str, Any], context: str, not_compared: dict[str, str]
) -> None:
    """Write `prediction.json`, `.md` and `.csv` into `folder`.

    Args:
        record: provenance of the measured figures.
        context: where the virtual card's context and properties come from.
        not_compared: recipes without a comparison, and why.

    Raises:
        ValueError: the figures beside the predicted ones are not measured.
    """
    if record["provenance"] != "measured":
        raise ValueError(f"a prediction is held against measured figures, and these are {record['provenance']}")
    rows = [
        {
            "recipe": figure.recipe,
            "phase": figure.phase,
            "reading": figure.reading,
            "predicted_bytes": figure.predicted,
            "predicted_provenance": "virtual",
            "measured_bytes": figure.measured,
            "measured_provenance": "measured",
            "error": figure.error,
            "limit_percent": LIMITS.get(figure.reading) if figure.phase == WHOLE_RUN else None,
        }
        for figure in figures
    ]
    left_out = "".join(f"\n- `{name}`: {why}" for name, why in not_compared.items())
    markdown = (
        f"# Predicted and measured on {record['device']}\n\n"
        "Peaks in GiB: **predicted** on a virtual card with the properties of the measured one, **measured** on the "
        f"card itself, the same recipe and versions. {context}\n\n"
        f"{_summary(figures)}\n\n"
        f"{markdown_table(_HEADERS, _cells(figures), text_columns=2)}\n\n"
        + (f"Not compared:{left_out}\n\n" if left_out else "")
        + f"{provenance_lines(record)}\n"
    )
    content = {"environment": record, "context": context, "figures": rows, "not_compared": not_compared}
    write_result(folder, "prediction", content, markdown, rows)


_HEADERS = (
    "recipe",
    "phase",
    *(f"{reading} {what}" for reading in READINGS for what in ("predicted", "measured", "error")),
)


def _cells(figures: Sequence[Figure]) -> list[list[str]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for figure in figures:  # in the order of READINGS within a phase
        cells = rows.setdefault((figure.recipe, figure.phase), [figure.recipe, figure.phase])
        cells += [gib(figure.predicted), gib(figure.measured), f"{figure.error:+.2%}"]
    return list(rows.values())


def _summary(figures: Sequence[Figure]) -> str:
    lines = []
    for reading in READINGS:
        errors = [abs(f.error) for f in figures if f.phase == WHOLE_RUN and f.reading == reading]
        if errors:
            limit = f", limit {LIMITS[reading]} %" if reading in LIMITS else ""
            lines.append(f"{reading}: median {statistics.median(errors):.2%}, worst {max(errors):.2%}{limit}")
    return f"Errors of the whole run over {len({f.recipe for f in figures})} recipes: {'; '.join(lines)}."
