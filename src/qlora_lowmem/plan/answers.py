"""What a plan says, as plain data. Bytes are integers; `None` and 0 mean that something was not asked for."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.plan.advice import Knob
from qlora_lowmem.plan.asked import Pair
from qlora_lowmem.plan.maximum import Maximum
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import SYNTHETIC, Recipe, Run
from qlora_lowmem.recipe.sections import is_hub_data
from qlora_lowmem.recipe.yaml_text import commented_yaml
from qlora_lowmem.units import format_bytes

LimitedBy = Literal["memory", "model", "limit"]


@dataclass(frozen=True)
class Need:
    """What a run held at its peak.

    Attributes:
        device_bytes: with the CUDA context: what is held against the card's usable memory.
        floor_bytes: what no method of training the recipe avoids (`memory/owners.py`); 0 where no step ended.
        host_bytes: page-locked host memory.
        fits: on the card itself. A run that does not was made again with room for it: the figures are what it needs.
        launches: kernels, copies and memsets of a steady optimizer step; None where none ended.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    floor_bytes: int
    host_bytes: int
    trainable_parameters: int
    fits: bool
    launches: int | None = None


@dataclass(frozen=True)
class Limit:
    """The largest value of a field that fits.

    Attributes:
        value: a multiple of `step`; 0 where not even the smallest fits.
        next_value: the next larger one, which was run and does not fit; 0 where `value` is the last one allowed.
        limited_by: `memory`; `model`, the length that the model was made for; or `limit`, the person's own.
    """

    value: int
    next_value: int
    step: int
    limited_by: LimitedBy


@dataclass(frozen=True)
class Tried:
    """A rung of the ladder at the wanted length, whether it fits there, and where it does, the launches of a step."""

    rung: str
    words: str
    fits: bool
    launches: int | None = None


@dataclass(frozen=True)
class Reach:
    """A rung of the ladder: how far it goes and, where they were asked for, what it costs in FLOPs, in launches of a
    step of that length and in host memory.
    """

    rung: str
    words: str
    longest: Limit
    flops_ratio: float | None = None
    host_bytes: int = 0
    launches: int | None = None


@dataclass(frozen=True)
class Shortfall:
    """What the leanest rung would need at the wanted length, where no rung fits there; `kinds` as in `Plan`."""

    rung: str
    need: Need
    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """The best recipe found.

    Attributes:
        recipe: of the model that the person named, as long as they asked for where that fits, else the longest.
        need, kinds: of that recipe, as in `Plan`.
        reaches_wanted: whether `longest` is at least the wanted length.
        flops_ratio: FLOPs of a step over those of one that computes nothing twice; None where they were not counted.
        launches_ratio: the same of launches, at this length.
    """

    rung: str
    words: str
    recipe: Recipe
    need: Need
    longest: Limit
    reaches_wanted: bool
    flops_ratio: float | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    launches_ratio: float | None = None


@dataclass(frozen=True)
class Plan:
    """The answer to one (recipe or model, card) pair.

    Attributes:
        subject: the recipe's name, or the model's.
        recipe_given: whether a recipe was asked about, or the best one for a model.
        wanted_tokens: the length that was asked for.
        fits: the recipe fits as it is; for a model, a recipe was found that reaches the wanted length.
        need, longest, batch: of the recipe as it is.
        kinds: the bytes of `need` by kind (`memory/kinds.py`), where they were asked for.
        knobs: single changes that save, in the order that `pair.ranked` states.
        proposal: None where the recipe fits as it is, or nothing fits.
        shortfall: None where something fits at the wanted length.
        reaches: every rung for a model, up to one that goes as far as lengths are looked at.
        unanswered: what was asked beside the answer, and why nothing came of it.
        failure: why there is no answer.
        bad_input: that failure is of what was asked, and no run was made.
        runs, cached: how many runs it took, and how many of them the cache had.
    """

    subject: str
    model: str
    card: str
    usable_bytes: int
    recipe_given: bool
    wanted_tokens: int
    fits: bool = False
    need: Need | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    longest: Limit | None = None
    batch: Limit | None = None
    knobs: tuple[Knob, ...] = ()
    tried: tuple[Tried, ...] = ()
    proposal: Proposal | None = None
    shortfall: Shortfall | None = None
    reaches: tuple[Reach, ...] = ()
    unanswered: tuple[str, ...] = ()
    failure: str | None = None
    bad_input: bool = False
    runs: int = 0
    cached: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the proposed recipe as its file would hold it."""
        return asdict(self)


def need_of(run: RecipeRun, *, fits: bool) -> Need:
    """A run's peaks; zeros where it failed."""
    host, learn, peak = run.pinned_host_bytes, run.trainable_parameters, run.peak
    return Need(peak.allocated, peak.reserved, peak.device, run.floor_bytes, host, learn, fits, run.step_launches)


def limit_of(found: Maximum[RecipeRun], step: int, last: LimitedBy) -> Limit:
    """What a search came to; `last` says what set its limit."""
    return Limit(found.value, found.next_value, step, "memory" if found.next_value else last)


def recipe_file(pair: Pair, plan: Plan, target: Path) -> str | None:
    """The recipe that fits as the text of `target`, data relative to it, output under its name; None if none fits."""
    found = plan.proposal
    if found is not None:
        recipe, need, longest, why = found.recipe, found.need, found.longest, f"{found.rung}: {found.words}"
    elif plan.fits and plan.need is not None and plan.longest is not None:
        asked = pair.model.as_asked(pair.model.recipe, plan.card)
        recipe, need, longest, why = asked, plan.need, plan.longest, "as it is"
    else:
        return None
    record = provenance_record(plan.card, "virtual")
    length, usable = recipe.batch.max_seq_length, format_bytes(plan.usable_bytes)
    room = format_bytes(plan.usable_bytes - need.device_bytes)
    title = [
        f"{plan.model} on {plan.card}: {why}.",
        f"{format_bytes(need.device_bytes)} of {usable} usable at {length:,} tokens, the CUDA context in it (virtual).",
        f"That leaves {room} of room; the longest sequence that fits is {longest.value:,} tokens.",
        f"{record['command']}, {record['date']}, commit {record['commit']}",
    ]
    output_dir = recipe.run.output_dir
    named = {"data": recipe.data.data, "eval_data": recipe.data.eval_data}
    files = {leaf: name for leaf, name in named.items() if name not in (None, SYNTHETIC) and not is_hub_data(str(name))}
    moved_to: dict[str, Any] = {leaf: os.path.relpath(str(name), target.parent) for leaf, name in files.items()}
    if output_dir == Run().output_dir.replace("{name}", recipe.name):
        output_dir = Run().output_dir
    moved = replace(recipe, data=replace(recipe.data, **moved_to), run=replace(recipe.run, output_dir=output_dir))
    return commented_yaml(moved, title)
