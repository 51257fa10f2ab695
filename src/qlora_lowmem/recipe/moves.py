"""What a knob of a recipe can be changed to so that a step needs less memory: what that costs, and what it keeps.

The one table of it. Plans try every move alone (`plan/advice.py`) and climb rungs made of moves (`plan/ladder.py`); a
run that is out of memory makes the first that keeps what it trains, and may go on with it (`run_folder/resumption.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.io import replace_fields

CostKind = Literal["none", "slower", "changes training"]

# What decides how much memory a step takes, and not what is trained: it may differ between two starts of a run.
_MEMORY_ONLY = {
    "attention", "gradient_checkpointing", "loss", "activation_offloading", "expandable_segments", "max_memory",
    "lean", "tile_length", "scan_chunk_length", "scan", "checkpoints", "loss_tile_bytes", "dequantised_tile_bytes",
    "dataloader_workers", "pin_memory", "gradient_release",
}  # fmt: skip
# What is looked at on the way, and never trained on.
_LOOKED_AT = {"eval_data"}
_BATCH = {"batch_size", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Move:
    """One thing that a recipe can be changed to.

    Attributes:
        open: the recipe has not made it, and holds what it makes smaller.
        sets: the values that make the move, leaf name to value, whatever the recipe has.
        kind, cost: what it costs besides memory, as a kind and in words; what does not change training is exact.
        recomputes: it changes how many multiplications a step takes.
    """

    name: str
    open: bool
    sets: Mapping[str, Any]
    kind: CostKind
    cost: str
    recomputes: bool = False


@dataclass(frozen=True)
class Change:
    """A move made in a recipe: the fields that it changed there, and the recipe with them changed.

    `keeps_training` says that a run that has begun may go on with it.
    """

    move: Move
    changes: Mapping[str, Any]
    recipe: Recipe
    keeps_training: bool

    @property
    def flags(self) -> list[str]:
        """The changes on the command line."""
        written = {leaf: str(value).lower() for leaf, value in self.changes.items()}
        return [part for leaf, text in written.items() for part in (f"--{leaf.replace('_', '-')}", text)]


def one_by_one(recipe: Recipe) -> dict[str, Any]:
    """The samples of a step in micro-batches of one. Gradients are then summed over a step, and not released."""
    return {"batch_size": 1, "gradient_accumulation_steps": _samples_a_step(recipe), "gradient_release": False}


def _samples_a_step(recipe: Recipe) -> int:
    return recipe.batch.batch_size * recipe.batch.gradient_accumulation_steps


def moves(recipe: Recipe, *, tiles: bool) -> tuple[Move, ...]:
    """Every move, made or not, in the order in which a run that is out of memory makes them.

    Args:
        tiles: whether the lean implementations run the model's layers in tiles (`lean/families.py`). Where they do
            not, they save next to nothing, and activations are what goes to host memory.
    """
    batch, memory, lean, optimizer = recipe.batch, recipe.memory, recipe.lean, recipe.optimizer
    half, together = batch.max_seq_length // 2, _samples_a_step(recipe)
    in_tiles = tiles and lean.lean
    in_turn = " and --gradient-release false" if optimizer.gradient_release else ""
    halved = {"batch_size": batch.batch_size // 2, "gradient_accumulation_steps": batch.gradient_accumulation_steps * 2}
    lean_layers = {"gradient_checkpointing": True, "loss": "fused", "activation_offloading": False, "lean": True}
    # With what contradicts any optimizer but adamw_torch as it is by default.
    eight_bits = {"optimizer": "adamw_8bit", "optimizer_state_dtype": "auto", "gradient_release": False}
    rounded = "the embeddings and the LM head are rounded to"
    travels = "travel to host memory and back"
    return (
        Move("growing segments", not memory.expandable_segments, {"expandable_segments": True}, "none",
             "none: the allocator grows its segments (Linux only)"),
        Move("fused loss", memory.loss == "full", {"loss": "fused"}, "slower",
             "exact; the logits are computed again in backward", recomputes=True),
        Move("sdpa", recipe.base.attention == "eager", {"attention": "auto"}, "none",
             "none: the same sums, their terms not stored"),
        Move("checkpointing", not memory.gradient_checkpointing, {"gradient_checkpointing": True}, "slower",
             "exact; each layer runs forward a second time", recomputes=True),
        Move("one sample", batch.batch_size > 1, {"batch_size": 1}, "slower",
             f"exact with --gradient-accumulation-steps {together}{in_turn}: the same samples a step, one by one"),
        Move("half a micro-batch", batch.batch_size % 2 == 0, halved, "slower",
             "exact; the same samples a step, in twice as many micro-batches"),
        Move("tiles", tiles and not lean.lean, lean_layers, "slower",
             "exact; layers run in tiles, most layers' inputs are computed again", recomputes=True),
        Move("host", in_tiles and lean.checkpoints != "host", {"checkpoints": "host"}, "slower",
             f"exact; layers' inputs {travels}", recomputes=True),
        Move("offloading", memory.gradient_checkpointing and not memory.activation_offloading,
             {"activation_offloading": True}, "slower", f"exact; kept activations {travels}"),
        Move("4-bit weights", not recipe.quantization.load_in_4bit, {"load_in_4bit": True}, "changes training",
             "the frozen weights are rounded to 4 bits"),
        Move("8-bit embeddings", in_tiles and lean.quantised_embeddings == "none", {"quantised_embeddings": "8bit"},
             "changes training", f"{rounded} 8 bits"),
        Move("4-bit embeddings", in_tiles and lean.quantised_embeddings != "4bit", {"quantised_embeddings": "4bit"},
             "changes training", f"{rounded} 4 bits"),
        Move("8-bit AdamW", optimizer.optimizer.startswith("adamw_torch"), eight_bits, "changes training",
             "the optimizer's state is rounded to 8 bits"),
        Move("half the length", batch.max_seq_length >= 128, {"max_seq_length": half}, "changes training",
             f"what lies beyond {half:,} tokens of a sample is not learnt"),
        Move("query and value", recipe.lora.target_modules != "attention-qv", {"target_modules": "attention-qv"},
             "changes training", "query and value projections alone learn"),
        Move("half the rank", recipe.lora.lora_r >= 8, {"lora_r": recipe.lora.lora_r // 2}, "changes training",
             "adapters of half the rank"),
    )  # fmt: skip


def changes_of(recipe: Recipe, *, tiles: bool) -> Iterator[Change]:
    """Each move that `recipe` has not made and can make: one that contradicts another field of it is no way out."""
    now = field_values(recipe)
    for move in moves(recipe, tiles=tiles):
        if not move.open:
            continue
        changes = {leaf: value for leaf, value in move.sets.items() if now[leaf] != value}
        try:
            changed = replace_fields(recipe, changes)
        except UsageError:
            continue
        same = _samples_a_step(changed) == _samples_a_step(recipe)
        yield Change(move, changes, changed, all(keeps_training(leaf, same_samples=same) for leaf in changes))


def keeps_training(leaf: str, *, same_samples: bool) -> bool:
    """Whether a field may differ between two starts of one run: what is trained stays the same, up to rounding.

    With as many samples a step as before, its batch may be put together in another way.
    """
    return leaf in _MEMORY_ONLY | _LOOKED_AT or (same_samples and leaf in _BATCH)
