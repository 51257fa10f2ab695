"""Predicted against measured: what a virtual card said, and what the card itself did."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.results.kind import Chart, Fields, Provenance, Section, Source, provenance_of
from qlora_lowmem.results.kinds.prediction import prediction
from qlora_lowmem.results.kinds.prediction_table import LIMITS, READINGS, WHOLE_RUN, Figure
from qlora_lowmem.results.tables import Cell, Table, gib_cell, ratio_cell


@dataclass(frozen=True)
class Predicted:
    """The content of a `prediction.json`.

    Attributes:
        context: where the virtual card's context and properties come from.
        not_compared: recipes without a comparison, and why.
    """

    figures: tuple[Figure, ...]
    context: str
    not_compared: dict[str, str]


def recognises(content: dict[str, Any]) -> bool:
    """Figures, and what has none."""
    return "figures" in content and "not_compared" in content


def read(content: Fields) -> tuple[Provenance, Predicted]:
    """Its figures, in bytes; those of whole runs are among them."""
    figures = []
    for row in content.objects("figures"):
        reading = next((reading for reading in READINGS if reading == row["reading"]), None)
        if reading is None:
            raise ValueError(f"figures: {row['reading']!r} is not one of {', '.join(READINGS)}")
        sizes = row.count("predicted_bytes"), row.count("measured_bytes")
        if not all(sizes):
            raise ValueError(f"figures: a peak of {row['recipe']!r} is 0 bytes")
        figures.append(Figure(row.text("recipe"), row.text("phase"), reading, *sizes))
    if not any(figure.phase == WHOLE_RUN for figure in figures):
        raise ValueError(f"figures: none of a {WHOLE_RUN}")
    left_out = content.object("not_compared")
    names = {name: left_out.text(name) for name in left_out.raw}
    return provenance_of(content), Predicted(tuple(figures), content.text("context"), names)


def sections(found: Sequence[tuple[Source, Predicted]]) -> list[Section]:
    """One section a file."""
    return [_section(source, data, len(found) > 1) for source, data in found]


def _section(source: Source, data: Predicted, several: bool) -> Section:
    device = source.provenance.device
    whole = [figure for figure in data.figures if figure.phase == WHOLE_RUN]
    judged = [figure for figure in whole if figure.reading in LIMITS]
    within = sum(figure.within(LIMITS[figure.reading]) for figure in judged)
    worst = max(whole, key=lambda figure: abs(figure.error))
    summary = (
        f"{within} of {len(judged)} readings of whole runs are within their limits "
        f"({', '.join(f'{reading} {limit} %' for reading, limit in LIMITS.items())}). The worst: {worst.recipe}, "
        f"{worst.reading}, {worst.error:+.2%}."
    )
    chart = Chart(
        "prediction", "Predicted against measured", summary, lambda style: prediction(style, whole), (_table(data),)
    )
    left_out = tuple((Cell(name), Cell(why)) for name, why in data.not_compared.items())
    return Section(
        name="prediction",
        title=f"Predicted against measured{f', {device}' if several else ''}",
        text=f"Each recipe on {device} (measured) and on a virtual card with its properties (virtual). {data.context}",
        sources=(source,),
        charts=(chart,),
        tables=(Table("Not compared", ("recipe", "why"), left_out),) if left_out else (),
        highlights=((f"{worst.error:+.2%}", "the worst prediction of a whole run's peak"),),
    )


def _table(data: Predicted) -> Table:
    rows = []
    for figure in data.figures:
        limit = LIMITS.get(figure.reading) if figure.phase == WHOLE_RUN else None
        tone = "" if limit is None else "good" if figure.within(limit) else "bad"
        rows.append(
            (
                Cell(figure.recipe),
                Cell(figure.phase),
                Cell(figure.reading),
                gib_cell(figure.predicted),
                gib_cell(figure.measured),
                ratio_cell(f"{figure.error:+.2%}", figure.error, tone),
                Cell(f"{limit} %" if limit is not None else "-"),
            )
        )
    headers = ("recipe", "phase", "reading", "predicted", "measured", "error", "limit")
    return Table("Peaks in GiB, predicted and measured", headers, tuple(rows))
