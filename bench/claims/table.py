"""`claims.md`, `.json` and `.csv`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims.rows import Row
from claims.verdicts import LEAST_SAVING, NO_SAVING, SLACK
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

_HEADERS = ("statement", "model", "claimed", "found", "before", "after", "verdict", "why")
_SUMMARY = ("statement", "model", "before", "after", "claimed", "found", "verdict")


def write_claims(folder: Path, rows: Sequence[Row], record: dict[str, Any]) -> None:
    """Write the table into `folder`; `record` is its provenance."""
    verdicts = Counter(row.verdict for row in rows)
    topics = list(dict.fromkeys(row.topic for row in rows))
    sections = []
    for topic in topics:
        of_topic = [row for row in rows if row.topic == topic]
        criteria = list(dict.fromkeys(row.criterion for row in of_topic))
        table = markdown_table(_HEADERS, [_cells(row) for row in of_topic], text_columns=len(_HEADERS))
        sections.append(f"## {topic}\n\n{table}\n\nCriterion: {'; or '.join(criteria)}.\n")
    markdown = (
        "# The statements that guided the set-up, put to the test\n\n"
        "Each statement was tested by running it in full size on a virtual card (rtx-4050-laptop-6gb, with as much "
        "memory as the run asked for; where it says so, another). Peaks are allocated bytes of the second optimizer "
        "step at two micro-batches a step, unless a row says otherwise; MB are 10^6 and GB 10^9 bytes. A verdict is "
        f"computed from its criterion: a range allows {SLACK:.0%} of its nearer limit for *partly*, and a saving is "
        f"*true* from {LEAST_SAVING:.0%} of the peak on and *partly* from {NO_SAVING:.1%} on.\n\n"
        f"{_count(rows)}\n\n"
        f"{chr(10).join(sections)}\n{provenance_lines(record)}\n"
    )
    plain = [row.to_dict() for row in rows]
    content = {
        "environment": record,
        "device": record["device"],
        "provenance": record["provenance"],
        "verdicts": dict(verdicts),
        "rows": plain,
    }
    write_result(folder, "claims", content, markdown, plain)


def summary_table(rows: Sequence[Row]) -> str:
    """What a terminal has room for: each statement, its figures and the verdict, topic by topic."""
    topics = list(dict.fromkeys(row.topic for row in rows))
    cells = [
        [row.statement, row.model, row.before.short, row.after.short, row.claimed, row.found, row.verdict]
        for row in sorted(rows, key=lambda row: topics.index(row.topic))
    ]
    return f"{markdown_table(_SUMMARY, cells, text_columns=len(_SUMMARY))}\n\n{_count(rows)}"


def _count(rows: Sequence[Row]) -> str:
    verdicts = Counter(row.verdict for row in rows)
    return f"{len(rows)} rows: {verdicts['true']} true, {verdicts['partly']} partly, {verdicts['false']} false."


def _cells(row: Row) -> list[str]:
    return [
        row.statement,
        row.model,
        row.claimed,
        row.found,
        row.before.text,
        row.after.text,
        f"**{row.verdict}**",
        row.reason,
    ]
