"""What would make a recipe need less: each knob tried on its own, on a virtual card with room for everything.

No rule of thumb: every figure is the peak of a run of the changed recipe. What a change costs is said in words; a
number stands there only where it was counted (`plan/`).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.lean.families import takes_tiles
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.plan.recipe_runs import RecipeRun, recipe_server, roomy, submit_recipe, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields
from qlora_lowmem.units import format_bytes

# In the order of a reader who wants memory: what costs nothing, what costs time, what changes the result.
CostKind = Literal["none", "slower", "changes training"]


@dataclass(frozen=True)
class Change:
    """One change of a recipe.

    Attributes:
        flags: as the command line takes it.
        recipe: with the change made.
        kind, cost: what it costs besides memory, as a kind and in words.
        recomputes: it changes how many multiplications a step takes.
    """

    flags: str
    recipe: Recipe
    kind: CostKind
    cost: str
    recomputes: bool = False


@dataclass(frozen=True)
class Knob:
    """One change of a recipe and what it brings, in bytes of what the card must hold.

    Attributes:
        kind, cost: as in `Change`.
        flops_ratio: multiplications of a step with it over those without; None where they were not counted.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

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


def card_like(device: str, total_bytes: int) -> virtual_gpu.Card | None:
    """The card of the table that is `device`: by its name, or by the name that CUDA gives it and about its memory."""
    for card in virtual_gpu.all_cards():
        same_name = device in (card.name, card.title.lower().replace(" ", "-"))
        if same_name and abs(card.total_bytes - total_bytes) < card.total_bytes // 10:
            return card
    return None


def candidate_changes(recipe: Recipe) -> list[Change]:
    """The single changes that this recipe has not made yet."""
    changes = []
    for applies, fields, kind, cost, recomputes in _wanted(recipe):
        if not applies:
            continue
        try:
            changed = replace_fields(recipe, fields)
        except QloraLowmemError:
            continue  # contradicts another field of this recipe, so it is no way out
        flags = " ".join(f"--{leaf.replace('_', '-')} {_shown(value)}" for leaf, value in fields.items())
        changes.append(Change(flags, changed, kind, cost, recomputes))
    return changes


def _shown(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _wanted(recipe: Recipe) -> list[tuple[bool, dict[str, Any], CostKind, str, bool]]:
    """(applies, fields, kind of cost, the cost in words, whether a step multiplies more)."""
    batch, memory, lean = recipe.batch, recipe.memory, recipe.lean
    half, together = batch.max_seq_length // 2, batch.batch_size * batch.gradient_accumulation_steps
    tiles = takes_tiles(resolve_model(recipe.base.model, recipe.base.weights, recipe.base.revision).text_config)
    needed = {
        "gradient_checkpointing": (memory.gradient_checkpointing, True),
        "loss": (memory.loss, "fused"),
        "activation_offloading": (memory.activation_offloading, False),
        "lean": (lean.lean, True),
    }
    to_lean = {leaf: wanted for leaf, (now, wanted) in needed.items() if now != wanted}
    wanted = recipe.optimizer
    # What contradicts any optimizer but adamw_torch goes with it.
    eight_bits: dict[str, Any] = {"optimizer": "adamw_8bit"}
    eight_bits |= {"optimizer_state_dtype": "auto"} if wanted.optimizer_state_dtype != "auto" else {}
    eight_bits |= {"gradient_release": False} if wanted.gradient_release else {}
    in_turn = " and --gradient-release false" if wanted.gradient_release else ""
    rounded = "the embeddings and the LM head are rounded to"
    travels = "travel to host memory and back"
    return [
        (not memory.expandable_segments, {"expandable_segments": True}, "none",
         "none: the allocator grows its segments (Linux only)", False),
        (recipe.base.attention == "eager", {"attention": "sdpa"}, "none",
         "none: the same sums, their terms not stored", False),
        (not memory.gradient_checkpointing, {"gradient_checkpointing": True}, "slower",
         "exact; each layer runs forward a second time", True),
        (memory.loss == "full", {"loss": "fused"}, "slower",
         "exact; the logits are computed again in backward", True),
        (batch.batch_size > 1, {"batch_size": 1}, "slower",
         f"exact with --gradient-accumulation-steps {together}{in_turn}: the same samples a step, one by one", False),
        (memory.gradient_checkpointing and not memory.activation_offloading, {"activation_offloading": True}, "slower",
         f"exact; kept activations {travels}", False),
        (tiles and not lean.lean, to_lean, "slower",
         "exact; layers run in tiles, most layers' inputs are computed again", True),
        (lean.lean and tiles and lean.checkpoints != "host", {"checkpoints": "host"}, "slower",
         f"exact; layers' inputs {travels}", True),
        (not recipe.quantization.load_in_4bit, {"load_in_4bit": True}, "changes training",
         "the frozen weights are rounded to 4 bits", False),
        (lean.lean and tiles and lean.quantised_embeddings == "none", {"quantised_embeddings": "8bit"},
         "changes training", f"{rounded} 8 bits", False),
        (lean.lean and tiles and lean.quantised_embeddings != "4bit", {"quantised_embeddings": "4bit"},
         "changes training", f"{rounded} 4 bits", False),
        (wanted.optimizer.startswith("adamw_torch"), eight_bits, "changes training",
         "the optimizer's state is rounded to 8 bits", False),
        (batch.max_seq_length >= 128, {"max_seq_length": half}, "changes training",
         f"what lies beyond {half:,} tokens of a sample is not learnt", False),
        (recipe.lora.target_modules != "attention-qv", {"target_modules": "attention-qv"}, "changes training",
         "query and value projections alone learn", False),
        (recipe.lora.lora_r >= 8, {"lora_r": recipe.lora.lora_r // 2}, "changes training",
         "adapters of half the rank", False),
    ]  # fmt: skip


def knobs_of(
    base: RecipeRun, changes: Sequence[Change], runs: Sequence[RecipeRun], card: virtual_gpu.Card
) -> tuple[Knob, ...]:
    """What each change saves of the peak of `base`, the most first; those that save nothing are left out."""
    assert base.profile is not None
    needed = base.profile.peak_device_bytes
    knobs = [
        Knob(
            change.flags,
            run.profile.peak_device_bytes,
            needed - run.profile.peak_device_bytes,
            run.profile.peak_device_bytes <= card.usable_bytes,
            change.kind,
            change.cost,
            host_bytes=run.pinned_host_bytes,
            trainable_parameters=run.trainable_parameters,
        )
        for change, run in zip(changes, runs, strict=True)
        if run.profile is not None and run.out_of_memory is None
    ]
    return tuple(sorted((knob for knob in knobs if knob.saves_bytes > 0), key=lambda knob: -knob.saves_bytes))


def advise(recipe: Recipe, card: virtual_gpu.Card, note: Callable[[str], None]) -> Advice:
    """Run `recipe` and each candidate change on a roomy virtual card of `card`'s kind.

    Raises:
        virtual_gpu.VirtualGPUUnavailable: this machine cannot run one.
        QloraLowmemError: the recipe itself fails for another reason than memory.
    """
    room = roomy(card)
    recipe = two_steps(recipe)
    changes = candidate_changes(recipe)
    note(f"trying {len(changes)} changes on a virtual {card.name} with room for all of them ...")
    with recipe_server() as server:
        futures: list[Future[RecipeRun]] = [
            submit_recipe(server, each, room) for each in (recipe, *(change.recipe for change in changes))
        ]
        base, *runs = [future.result() for future in tqdm(futures, desc="advice", unit="run")]
    if base.profile is None:
        raise QloraLowmemError(f"the recipe fails on a card with room for everything too: {base.failure}")
    return Advice(
        card.name,
        base.profile.peak_allocated_bytes,
        base.profile.peak_reserved_bytes,
        base.profile.peak_device_bytes,
        card.usable_bytes,
        knobs_of(base, changes, runs, card),
    )
