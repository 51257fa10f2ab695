"""Answers as people read them: one on a screen, in words for what a figure means; many in a table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qlora_lowmem.memory.kinds import KINDS
from qlora_lowmem.plan.advice import Knob
from qlora_lowmem.plan.answers import Limit, Need, Plan, Proposal, Reach
from qlora_lowmem.plan.kept_runs import COUNTED_TOKENS
from qlora_lowmem.results.tables import (
    FLOOR_TEXT,
    gib,
    known_gib,
    markdown_table,
    provenance_lines,
    times_floor,
    write_result,
)
from qlora_lowmem.units import MIB, format_bytes

# Kinds of less than this share of the peak are shown as one.
_SMALL = 0.01
_ENDS = {"memory": "", "model": "(model's end)", "limit": "(--limit)"}
_LIMITS = {"model": "as long as the model was made for", "limit": "no longer one was tried; --limit goes on"}


def lines(plan: Plan) -> Iterator[str]:
    """The answer, a line each, as far as it is known: what becomes known later comes below."""
    yield from _of_the_recipe(plan) if plan.recipe_given else _of_the_model(plan)
    if _ended(plan):
        yield ""
        yield from (f"Not answered: {reason}" for reason in plan.unanswered)
        yield _effort(plan)


def sweep_lines(plans: Sequence[Plan], *, full: bool) -> Iterator[str]:
    """Many answers, a row each; if `full`, the screen of each below."""
    yield plans_table(plans)
    for plan in plans if full else ():
        if not plan.failure:
            yield ""
            yield from lines(plan)


def _ended(plan: Plan) -> bool:
    return plan.seconds > 0


def _searched(plan: Plan) -> bool:
    """Whether it is known what fits, if anything does."""
    return plan.proposal is not None or plan.shortfall is not None or _ended(plan)


def _of_the_recipe(plan: Plan) -> Iterator[str]:
    room = plan.usable_bytes - plan.need.device_bytes if plan.need is not None else 0
    verdict = f"fits, with {format_bytes(room)} of room" if plan.fits else "does not fit"
    yield f"{plan.subject} at {plan.wanted_tokens:,} tokens on {plan.card}: {verdict}. (virtual)"
    if plan.need is not None:
        yield _needs(plan.need, plan.usable_bytes)
        yield from _step(plan.need)
        yield from _breakdown(plan.kinds, plan.need)
    if plan.longest is not None:
        yield ""
        yield f"Longest sequence: {_longest(plan.longest)}"
    if plan.batch is not None:
        further = f"{plan.batch.next_value:,} does not fit" if plan.batch.next_value else "no larger one was tried"
        largest = f"{plan.batch.value:,} samples of {plan.wanted_tokens:,} tokens" if plan.batch.value else "none"
        yield f"Largest batch:    {largest} ({further})"
    yield from _knobs(plan)
    if not plan.fits and (plan.tried or _ended(plan)):
        yield ""
        yield from _tried(plan)
        if _searched(plan):
            yield from _proposal(plan)
            yield from _flops(plan)


def _of_the_model(plan: Plan) -> Iterator[str]:
    if plan.tried:
        yield f"{plan.model} at {plan.wanted_tokens:,} tokens on {plan.card}, from the fastest recipe to the leanest:"
        yield from _tried(plan)
    if not _searched(plan):
        return
    if plan.tried:
        yield ""
    found = plan.proposal
    if found is not None and found.reaches_wanted:
        room = plan.usable_bytes - found.need.device_bytes
        verdict = f"fits at {found.recipe.batch.max_seq_length:,} tokens, with {format_bytes(room)} of room"
    else:
        verdict = f"nothing fits at the wanted {plan.wanted_tokens:,} tokens"
    yield f"{plan.model} on {plan.card}: {verdict}. (virtual)"
    if found is not None:
        yield _needs(found.need, plan.usable_bytes)
        yield from _step(found.need)
    yield ""
    yield from _proposal(plan)
    if found is not None:
        yield from _breakdown(found.kinds, found.need)
    yield from _flops(plan)
    if plan.reaches:
        yield ""
        yield "longest sequence  from the fastest recipe to the leanest, and what it costs"
        yield from map(_reach, plan.reaches)


def _reach(reach: Reach) -> str:
    """A row of the table of rungs."""
    length = f"{reach.longest.value:,} tokens" if reach.longest.value else "none"
    said = [f"{length:>16}  {reach.rung}: {reach.words}"]
    if reach.flops_ratio is not None:
        said.append(f"{reach.flops_ratio:.2f} x the FLOPs")
    if reach.launches is not None:
        said.append(_launches(reach.launches))
    if reach.host_bytes >= MIB:
        said.append(f"{format_bytes(reach.host_bytes)} of host memory")
    return f"{'; '.join(said)} {_ENDS[reach.longest.limited_by]}".rstrip()


def _tried(plan: Plan) -> Iterator[str]:
    for tried in plan.tried:
        launches = f"; {_launches(tried.launches)}" if tried.launches is not None else ""
        yield f"  {'fits' if tried.fits else 'too much':<9} {tried.rung}: {tried.words}{launches}"


def _launches(count: int) -> str:
    return f"{count:,} launches a step"


def _needs(need: Need, usable: int) -> str:
    host = f"; {format_bytes(need.host_bytes)} of host memory pinned" if need.host_bytes >= MIB else ""
    return (
        f"Needs {gib(need.device_bytes)} GiB of {gib(usable)} usable, the CUDA context in it "
        f"({gib(need.allocated_bytes)} allocated, {gib(need.reserved_bytes)} reserved){host}."
    )


def _step(need: Need) -> Iterator[str]:
    if need.launches is not None:
        yield f"An optimizer step is {need.launches:,} launches: kernels, copies and memsets."


def _breakdown(kinds: Mapping[str, int], need: Need) -> Iterator[str]:
    """Bytes by kind, the largest first; the small ones together."""
    if not kinds:
        return
    least = int(_SMALL * sum(kinds.values()))
    if sum(count < least for count in kinds.values()) == 1:
        least = 0
    large = sorted(((count, KINDS[kind]) for kind, count in kinds.items() if count >= least), reverse=True)
    rows = [[text, gib(count)] for count, text in large]
    if len(large) < len(kinds):
        rest = sum(count for count in kinds.values() if count < least)
        rows.append([f"{len(kinds) - len(large)} smaller kinds", gib(rest)])
    if need.floor_bytes:
        rows.append(["(the floor: weights, adapters, two residual tensors)", gib(need.floor_bytes)])
    yield ""
    yield from _table(rows, ["at the peak", "GiB"])


def _longest(limit: Limit) -> str:
    further = f"{limit.next_value:,} does not fit" if limit.next_value else _LIMITS[limit.limited_by]
    return f"{limit.value:,} tokens ({further})" if limit.value else f"none ({further})"


def _knobs(plan: Plan) -> Iterator[str]:
    if not plan.knobs:
        return
    assert plan.need is not None
    rows = []
    for knob in plan.knobs:
        fits = [] if plan.fits else ["yes" if knob.fits else "no"]
        rows.append([knob.change, gib(knob.saves_bytes), gib(knob.peak_device_bytes), *fits, cost(knob, plan.need)])
    yield ""
    yield from _table(rows, ["one change, each one run", "saves", "needs", *([] if plan.fits else ["fits"]), "cost"])


def cost(knob: Knob, base: Need) -> str:
    """What a change costs, with the figures that were counted."""
    text = knob.cost
    if knob.flops_ratio is not None:
        text += f"; {knob.flops_ratio:.2f} x the FLOPs"
    if knob.launches_ratio is not None and f"{knob.launches_ratio:.2f}" != "1.00":
        text += f"; {knob.launches_ratio:.2f} x the launches"
    if knob.host_bytes - base.host_bytes >= MIB:
        text += f"; {format_bytes(knob.host_bytes)} of host memory"
    if 0 < knob.trainable_parameters < base.trainable_parameters:
        text += f"; {knob.trainable_parameters:,} of {base.trainable_parameters:,} parameters learn"
    return text


def _proposal(plan: Plan) -> Iterator[str]:
    found, lacking = plan.proposal, plan.shortfall
    if found is None:
        yield f"No recipe fits {plan.card}, however short its sequence."
    else:
        yield from _proposed(found, plan)
    if lacking is not None:
        yield f"At {plan.wanted_tokens:,} tokens the leanest, {lacking.rung}, would take more than there is."
        yield _needs(lacking.need, plan.usable_bytes)
        yield from _breakdown(lacking.kinds, lacking.need)


def _proposed(found: Proposal, plan: Plan) -> Iterator[str]:
    length = found.recipe.batch.max_seq_length
    what = "Proposed" if found.reaches_wanted else "The leanest, at the longest sequence that fits"
    yield f"{what}: {found.rung}, {length:,} tokens; longest sequence {_longest(found.longest)}."
    yield f"  {_settings(found)}"
    if plan.recipe_given:
        yield f"  {_needs(found.need, plan.usable_bytes)}"
        yield from (f"  {line}" for line in _step(found.need))


def _flops(plan: Plan) -> Iterator[str]:
    found = plan.proposal
    if found is not None and found.flops_ratio is not None and found.rung != "fastest":
        also = f", and {found.launches_ratio:.2f} x its launches" if found.launches_ratio is not None else ""
        yield f"A step takes {found.flops_ratio:.2f} x the FLOPs of one that computes nothing twice{also}."


def _settings(found: Proposal) -> str:
    """What the proposed recipe sets of what rungs differ in."""
    lora, batch, memory, lean = found.recipe.lora, found.recipe.batch, found.recipe.memory, found.recipe.lean
    targets = lora.target_modules
    said = {
        f"{targets} targets" if isinstance(targets, str) else "its targets": True,
        f"r {lora.lora_r}": True,
        f"{batch.batch_size} x {batch.gradient_accumulation_steps} samples a step": True,
        found.recipe.optimizer.optimizer: True,
        f"lean, checkpoints {lean.checkpoints}": lean.lean,
        "gradient checkpointing": memory.gradient_checkpointing and not lean.lean,
        f"embeddings in {lean.quantised_embeddings}": lean.quantised_embeddings != "none",
        "activation offloading": memory.activation_offloading,
        "expandable segments": memory.expandable_segments,
    }
    return ", ".join(text for text, is_so in said.items() if is_so)


def _effort(plan: Plan) -> str:
    if plan.runs and plan.cached == plan.runs:
        return f"Answered from the cache (all {plan.runs} runs; --no-cache runs them again)."
    cached = f", {plan.cached} of them from the cache" if plan.cached else ""
    asked: list[Knob | Reach | Proposal] = [*plan.knobs, *plan.reaches]
    asked += [plan.proposal] if plan.proposal is not None else []
    counted = any(each.flops_ratio is not None for each in asked)
    note = f" FLOPs: matrix products of a step of {COUNTED_TOKENS:,} tokens at most, counted." if counted else ""
    return f"{plan.runs} runs{cached}, in {plan.seconds:.0f} s.{note}"


def _table(rows: list[list[str]], headers: list[str]) -> Iterator[str]:
    align = ["left" if header in (headers[0], "cost") else "right" for header in headers]
    yield from tabulate(rows, headers=headers, tablefmt="plain", disable_numparse=True, colalign=align).splitlines()


def _need(plan: Plan) -> Need | None:
    """Of what is proposed; else of the recipe as it is, or of the leanest that there is."""
    if plan.proposal is not None:
        return plan.proposal.need
    return plan.need or (plan.shortfall.need if plan.shortfall is not None else None)


def cells(plan: Plan) -> dict[str, str]:
    """A row for people: each cell by its column's heading."""
    found, need, longest = plan.proposal, _need(plan), plan.longest
    if found is not None:
        longest = found.longest
    following = ""
    if longest is not None:
        following = f"{longest.next_value:,}" if longest.next_value else _ENDS[longest.limited_by]
    return {
        "recipe or model": plan.subject,
        "card": plan.card,
        "wanted": f"{plan.wanted_tokens:,}",
        "fits": "failed" if plan.failure else ("yes" if plan.fits else "no"),
        "proposed": found.rung if found is not None else ("as it is" if plan.fits else "nothing"),
        "needs GiB": gib(need.device_bytes) if need is not None else "",
        "usable GiB": gib(plan.usable_bytes),
        "allocated GiB": known_gib(need.allocated_bytes) if need is not None else "",
        "floor GiB": known_gib(need.floor_bytes) if need is not None else "",
        "x floor": times_floor(need.allocated_bytes, need.floor_bytes) if need is not None else "",
        "launches": f"{need.launches:,}" if need is not None and need.launches is not None else "",
        "longest": f"{longest.value:,}" if longest is not None else "",
        "next": following,
    }


def plans_table(plans: Sequence[Plan]) -> str:
    """The answers as a Markdown table, with the reasons of those that failed below."""
    cards: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        if plan.failure:  # a reason that is the same on many cards is said once
            cards.setdefault((plan.subject, plan.failure), []).append(plan.card)
    failures = [f"{subject} on {', '.join(on)} failed: {failure}" for (subject, failure), on in cards.items()]
    return "\n".join([_markdown([cells(plan) for plan in plans]), *failures])


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    return markdown_table(tuple(rows[0]), [list(row.values()) for row in rows], text_columns=2)


def row(plan: Plan) -> dict[str, Any]:
    """A row for machines: flat, bytes as integers."""
    found, need, longest = plan.proposal, _need(plan), plan.longest
    if found is not None:
        longest = found.longest
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
        "launches": need.launches if need is not None else None,
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
    pairs = list(zip(plans, again, strict=True))
    shown = [
        cells(plan)
        | {
            "run again": _checked(run.device_bytes, run.fits),
            "next run": _checked(run.next_device_bytes, run.next_fits),
        }
        for plan, run in pairs
    ]
    title, below = "# What fits, and how far it reaches", provenance_lines(record)
    markdown = f"{title}\n\n{text} {FLOOR_TEXT}\n\n{_markdown(shown)}\n\n{below}\n"
    content = {"environment": record, "device": record["device"], "provenance": "virtual"}
    content["cases"] = [plan.to_dict() | {"again": asdict(run)} for plan, run in pairs]
    rows = [row(plan) | {f"again_{name}": value for name, value in asdict(run).items()} for plan, run in pairs]
    write_result(folder, "plan", content, markdown, rows)


def _checked(device_bytes: int, fits: bool) -> str:
    return f"{gib(device_bytes)} {'fits' if fits else 'does not fit'}"
