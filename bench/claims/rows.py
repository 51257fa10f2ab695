"""A tested statement: what was claimed, what was found, the verdict, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from claims.verdicts import Criterion, Verdict

Unit = Literal["bytes", "count"]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a number of bytes, or a count, and what it is of."""

    what: str
    value: int
    unit: Unit = "bytes"

    @property
    def text(self) -> str:
        """The figure as a person reads it."""
        return f"{self.what}: {self.value:,}{' B' if self.unit == 'bytes' else ''}"

    @property
    def short(self) -> str:
        """The figure alone, bytes in MB (10^6)."""
        return megabytes_text(self.value) if self.unit == "bytes" else f"{self.value:,}"


@dataclass(frozen=True)
class Row:
    """A statement on one model.

    Attributes:
        topic: which statement, the same for every model.
        statement: in words.
        claimed, found: the two figures in the statement's own unit.
        before, after: the two sides that `found` was computed from.
        criterion: what makes it true, partly true or false.
        reason: why, in one sentence.
    """

    topic: str
    statement: str
    model: str
    claimed: str
    found: str
    before: Side
    after: Side
    criterion: str
    verdict: Verdict
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, a column a figure."""
        return {
            "topic": self.topic,
            "statement": self.statement,
            "model": self.model,
            "claimed": self.claimed,
            "found": self.found,
            "before": self.before.what,
            "before_value": self.before.value,
            "after": self.after.what,
            "after_value": self.after.value,
            "unit": self.after.unit,
            "criterion": self.criterion,
            "verdict": self.verdict,
            "reason": self.reason,
        }


def judged(
    topic: str,
    statement: str,
    model: str,
    criterion: Criterion,
    claimed: str,
    figure: float,
    found: str,
    sides: tuple[Side, Side],
    reasons: Mapping[Verdict, str],
) -> Row:
    """The row of `figure` under `criterion`.

    A reason is prose, written for a verdict. Where the figures come to a verdict that nobody has explained, there is
    no row, so that no reason ever stands beside a verdict that it does not explain.

    Raises:
        LookupError: `reasons` holds none for the verdict.
    """
    verdict = criterion.judge(figure)
    if verdict not in reasons:
        raise LookupError(
            f"{topic}, {model}: the figure {found} makes it {verdict!r} ({criterion.text}), and no reason is written "
            f"for that; look at {sides[0].text} and {sides[1].text} and write one"
        )
    before, after = sides
    return Row(topic, statement, model, claimed, found, before, after, criterion.text, verdict, reasons[verdict])


def differences_told(rows: Sequence[Row]) -> list[Row]:
    """The rows, each reason ending with the first model's verdict on the same statement where that is another one."""
    firsts: dict[str, Row] = {}
    told = []
    for row in rows:
        first = firsts.setdefault(row.statement, row)
        if row.verdict != first.verdict:
            more = f"; on {first.model} it is {first.verdict}: {first.found}."
            row = replace(row, reason=row.reason.removesuffix(".") + more)
        told.append(row)
    return told


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{share:.1%}"


def megabytes_text(count: int) -> str:
    """Bytes in MB (10^6), the unit of the statements."""
    return f"{count / 10**6:,.1f} MB"


def gigabytes_text(count: int) -> str:
    """Bytes in GB (10^9), the unit of the statements."""
    return f"{count / 10**9:,.2f} GB"
