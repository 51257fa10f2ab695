"""What would make a recipe need less: each knob tried on its own, on a virtual card with room for everything.

No rule of thumb: every figure is the peak of a run of the changed recipe. What a change costs is said in words; a
number stands there only where it was counted (`plan/`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.plan.asked import runs_in_tiles
from qlora_lowmem.plan.recipe_runs import RecipeRun, recipe_server, roomy, submit_recipe, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.moves import Change, CostKind, changes_of
from qlora_lowmem.units import format_bytes


@dataclass(frozen=True)
class Knob:
    """One change of a recipe and what it brings, in bytes of what the card must hold.

    Attributes:
        kind, cost: as in `Move`.
        flops_ratio: multiplications of a step with it over those without; None where they were not counted.
        launches_ratio: the same of kernels, copies and memsets.
        host_bytes: page-locked host memory that it takes.
        trainable_parameters: of the adapters with it.
    """

    change: str
    peak_device_bytes: int
    saves_bytes: int
    fits: bool
    kind: CostKind
    cost: str
    flops_ratio: float | None = None
    host_bytes: int = 0
    trainable_parameters: int = 0
    launches_ratio: float | None = None


@dataclass(frozen=True)
class Advice:
    """What the recipe needs, what the card has, and the knobs ranked by what they save.

    `needs_device_bytes` is the peak on a virtual card of the same kind with unlimited memory.
    """

    card: str
    needs_allocated_bytes: int
    needs_reserved_bytes: int
    needs_device_bytes: int
    usable_bytes: int
    knobs: tuple[Knob, ...]

    def lines(self) -> Iterator[str]:
        """The advice as a person reads it."""
        yield (
            f"Needed: {format_bytes(self.needs_device_bytes)} with the CUDA context "
            f"({format_bytes(self.needs_allocated_bytes)} allocated, "
            f"{format_bytes(self.needs_reserved_bytes)} reserved); "
            f"{self.card} has {format_bytes(self.usable_bytes)} usable. (virtual)"
        )
        if self.knobs:
            yield "One change at a time, by what it saves of that (each one run, virtual):"
        width = max((len(knob.change) for knob in self.knobs), default=0)
        for knob in self.knobs:
            verdict = "fits" if knob.fits else "still too much alone"
            yield (
                f"  {knob.change:<{width}}  saves {format_bytes(knob.saves_bytes):>11}"
                f"  -> {format_bytes(knob.peak_device_bytes):>11}  {verdict}"
            )


def candidate_changes(recipe: Recipe, *, tiles: bool) -> list[Change]:
    """The single changes to try: every move that `recipe` can make; of a batch, one sample, which saves the most."""
    return [change for change in changes_of(recipe, tiles=tiles) if change.move.name != "half a micro-batch"]


def knobs_of(
    base: RecipeRun, changes: Sequence[Change], runs: Sequence[RecipeRun], card: virtual_gpu.Card
) -> tuple[Knob, ...]:
    """What each change saves of the peak of `base`, the most first; those that save nothing are left out."""
    assert base.profile is not None
    needed = base.profile.peak.device
    knobs = [
        Knob(
            " ".join(change.flags),
            run.profile.peak.device,
            needed - run.profile.peak.device,
            run.profile.peak.device <= card.usable_bytes,
            change.move.kind,
            change.move.cost,
            host_bytes=run.pinned_host_bytes,
            trainable_parameters=run.trainable_parameters,
            launches_ratio=run.launches_over(base),
        )
        for change, run in zip(changes, runs, strict=True)
        if run.profile is not None and run.out_of_memory is None
    ]
    return tuple(sorted((knob for knob in knobs if knob.saves_bytes > 0), key=lambda knob: -knob.saves_bytes))


def advise(recipe: Recipe, card: virtual_gpu.Card, note: Callable[[str], None]) -> Advice:
    """Run `recipe` and each candidate change on a roomy virtual card of `card`'s kind.

    Raises:
        VirtualGPUUnavailable: this machine cannot run one.
        QloraLowmemError: the recipe itself fails for another reason than memory.
    """
    room = roomy(card)
    recipe = two_steps(recipe)
    changes = candidate_changes(recipe, tiles=runs_in_tiles(recipe))
    note(f"trying {len(changes)} changes on a virtual {card.name} with room for all of them ...")
    with recipe_server() as server:
        futures = [submit_recipe(server, each, room) for each in (recipe, *(change.recipe for change in changes))]
        base, *runs = [future.result() for future in tqdm(futures, desc="advice", unit="run")]
    if base.profile is None:
        raise base.fault("the recipe fails on a card with room for everything too")
    needs, knobs = base.profile.peak, knobs_of(base, changes, runs, card)
    return Advice(card.name, needs.allocated, needs.reserved, needs.device, card.usable_bytes, knobs)
