"""Many answers as one table, on the screen and as a result."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.plan.answers import Limit, Plan
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    gib,
    known_gib,
    markdown_table,
    provenance_lines,
    times_floor,
    write_result,
)

_HEADERS = (
    "recipe or model",
    "card",
    "wanted",
    "fits",
    "proposed",
    "needs GiB",
    "usable GiB",
    "allocated GiB",
    "floor GiB",
    "x floor",
    "longest",
    "next",
)
_ENDS = {"model": "(model's end)", "limit": "(--limit)"}


def cells(plan: Plan) -> list[str]:
    """A row for people."""
    found, need, longest = plan.proposal, plan.need, plan.longest
    if found is not None:
        need, longest = found.need, found.longest
    return [
        plan.subject,
        plan.card,
        f"{plan.wanted_tokens:,}",
        "failed" if plan.failure else ("yes" if plan.fits else "no"),
        found.rung if found is not None else ("as it is" if plan.fits else "nothing"),
        gib(need.device_bytes) if need is not None else "",
        gib(plan.usable_bytes),
        known_gib(need.allocated_bytes) if need is not None else "",
        known_gib(need.floor_bytes) if need is not None else "",
        times_floor(need.allocated_bytes, need.floor_bytes) if need is not None else "",
        f"{longest.value:,}" if longest is not None else "",
        _next(longest),
    ]


def _next(longest: Limit | None) -> str:
    if longest is None:
        return ""
    return f"{longest.next_value:,}" if longest.next_value else _ENDS[longest.limited_by]


def plans_table(plans: Sequence[Plan]) -> str:
    """The answers as a Markdown table, with the reasons of those that failed below."""
    table = markdown_table(_HEADERS, [cells(plan) for plan in plans], text_columns=2)
    return "\n".join([table, *_failures(plans)])


def _failures(plans: Sequence[Plan]) -> Iterator[str]:
    """A reason that is the same on many cards is said once."""
    cards: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        if plan.failure:
            cards.setdefault((plan.subject, plan.failure), []).append(plan.card)
    for (subject, failure), names in cards.items():
        yield f"{subject} on {', '.join(names)} failed: {failure}"


def row(plan: Plan) -> dict[str, Any]:
    """A row for machines: flat, bytes as integers."""
    found, need, longest = plan.proposal, plan.need, plan.longest
    if found is not None:
        need, longest = found.need, found.longest
    return {
        "subject": plan.subject,
        "model": plan.model,
        "card": plan.card,
        "wanted_tokens": plan.wanted_tokens,
        "fits": plan.fits,
        "proposed": found.rung if found is not None else "",
        "longest_tokens": longest.value if longest is not None else 0,
        "next_tokens": longest.next_value if longest is not None else 0,
        "limited_by": longest.limited_by if longest is not None else "",
        "peak_allocated_bytes": need.allocated_bytes if need is not None else 0,
        "peak_reserved_bytes": need.reserved_bytes if need is not None else 0,
        "peak_device_bytes": need.device_bytes if need is not None else 0,
        "floor_bytes": need.floor_bytes if need is not None else 0,
        "usable_bytes": plan.usable_bytes,
        "runs": plan.runs,
        "cached": plan.cached,
        "seconds": round(plan.seconds, 1),
    }


@dataclass(frozen=True)
class Again:
    """A proposal run once more from its recipe alone, and the next larger length: what each held, and whether it fits.

    A run that ended out of memory held what it had got until then.
    """

    device_bytes: int
    fits: bool
    next_device_bytes: int
    next_fits: bool


def write_plans(folder: Path, plans: Sequence[Plan], again: Sequence[Again], text: str, record: dict[str, Any]) -> None:
    """Write `plan` as JSON (the source), Markdown and CSV; `text` is the paragraph under its title."""
    shown = [
        [*cells(plan), _checked(run.device_bytes, run.fits), _checked(run.next_device_bytes, run.next_fits)]
        for plan, run in zip(plans, again, strict=True)
    ]
    table = markdown_table((*_HEADERS, "run again", "next run"), shown, text_columns=2)
    markdown = f"# What fits, and how far it reaches\n\n{text} {FLOOR_TEXT}\n\n{table}\n\n{provenance_lines(record)}\n"
    content = {"environment": record, "device": record["device"], "provenance": "virtual"}
    content["cases"] = [plan.to_dict() | {"again": asdict(run)} for plan, run in zip(plans, again, strict=True)]
    rows = [
        row(plan) | {f"again_{k}": v for k, v in asdict(run).items()} for plan, run in zip(plans, again, strict=True)
    ]
    write_result(folder, "plan", content, markdown, rows)


def _checked(device_bytes: int, fits: bool) -> str:
    return f"{gib(device_bytes)} {'fits' if fits else 'does not fit'}"
