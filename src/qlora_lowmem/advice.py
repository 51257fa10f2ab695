"""What would make a recipe fit: each knob tried on its own, on a virtual card with room for everything.

No rule of thumb: every figure is the peak of a run of the changed recipe.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe_io import replace_field
from qlora_lowmem.units import format_bytes
from qlora_lowmem.virtual_runs import recipe_server, submit_recipe

# Room for everything: no recipe of this project's models needs as much.
ROOMY_BYTES = 1 << 42


@dataclass(frozen=True)
class Knob:
    """One change of a recipe and what it brings, in bytes of what the card must hold."""

    change: str
    peak_device_bytes: int
    saves_bytes: int
    fits: bool


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


def candidate_changes(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The single changes that this recipe has not made yet, as flags of the command line."""
    batch, memory = recipe.batch, recipe.memory
    wanted: list[tuple[bool, str, object]] = [
        (not memory.gradient_checkpointing, "gradient_checkpointing", True),
        (memory.loss == "full", "loss", "fused"),
        (recipe.base.attention == "eager", "attention", "sdpa"),
        (not recipe.quantization.load_in_4bit, "load_in_4bit", True),
        (batch.batch_size > 1, "batch_size", 1),
        (batch.max_seq_length >= 128, "max_seq_length", batch.max_seq_length // 2),
        (recipe.lora.target_modules not in ("attention-qv",), "target_modules", "attention-qv"),
        (recipe.lora.lora_r >= 8, "lora_r", recipe.lora.lora_r // 2),
        (memory.gradient_checkpointing and not memory.activation_offloading, "activation_offloading", True),
        (not memory.expandable_segments, "expandable_segments", True),
        (recipe.optimizer.optimizer.startswith("adamw_torch"), "optimizer", "adamw_8bit"),
    ]
    changes = []
    for applies, leaf, value in wanted:
        if not applies:
            continue
        shown = str(value).lower() if isinstance(value, bool) else value
        try:
            changes.append((f"--{leaf.replace('_', '-')} {shown}", replace_field(recipe, leaf, value)))
        except QloraLowmemError:
            continue  # contradicts another field of this recipe, so it is no way out
    return changes


def advise(recipe: Recipe, card: virtual_gpu.Card, note: Callable[[str], None]) -> Advice:
    """Run `recipe` and each candidate change on a roomy virtual card of `card`'s kind.

    Raises:
        virtual_gpu.VirtualGPUUnavailable: this machine cannot run one.
        QloraLowmemError: the recipe itself fails for another reason than memory.
    """
    roomy = card.with_memory(ROOMY_BYTES)
    changes = [("as it is", recipe), *candidate_changes(recipe)]
    note(f"trying {len(changes) - 1} changes on a virtual {card.name} with room for all of them ...")
    with recipe_server() as server:
        futures = [submit_recipe(server, changed, roomy) for _, changed in changes]
        runs = [future.result() for future in tqdm(futures, desc="advice", unit="run")]
    base = runs[0].profile
    if base is None:
        raise QloraLowmemError(f"the recipe fails on a card with room for everything too: {runs[0].failure}")
    knobs = [
        Knob(
            change,
            run.profile.peak_device_bytes,
            base.peak_device_bytes - run.profile.peak_device_bytes,
            run.profile.peak_device_bytes <= card.usable_bytes,
        )
        for (change, _), run in zip(changes[1:], runs[1:], strict=True)
        if run.profile is not None
    ]
    return Advice(
        card.name,
        base.peak_allocated_bytes,
        base.peak_reserved_bytes,
        base.peak_device_bytes,
        card.usable_bytes,
        tuple(sorted((knob for knob in knobs if knob.saves_bytes > 0), key=lambda knob: -knob.saves_bytes)),
    )
