"""The retreat of a run that is out of memory: the next knob that takes less and trains the same, in a stated order.

What costs no time comes first, what costs most comes last. Each keeps what is trained (`resumption.py` lets a run go on
with it), so the checkpoint of the last good step is not lost.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qlora_lowmem.environment import words_of
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields


@dataclass(frozen=True)
class Retreat:
    """Fields to change together, and the recipe that comes of it."""

    changes: dict[str, Any]
    recipe: Recipe

    @property
    def flags(self) -> list[str]:
        """The changes on the command line."""
        written = {leaf: str(value).lower() for leaf, value in self.changes.items()}
        return [part for leaf, text in written.items() for part in (f"--{leaf.replace('_', '-')}", text)]


def next_retreat(recipe: Recipe) -> Retreat | None:
    """The first step of the order that `recipe` has not made and can make; None where there is none left.

    The order: growing segments, the fused loss, attention without scores, checkpointing, half a micro-batch with twice
    the accumulation, lean layers, checkpoints in host memory; for what is not lean, activations in host memory.
    """
    batch = recipe.batch
    order: list[tuple[bool, dict[str, Any]]] = [
        (not recipe.memory.expandable_segments, {"expandable_segments": True}),
        (recipe.memory.loss == "full", {"loss": "fused"}),
        (recipe.base.attention == "eager", {"attention": "sdpa"}),
        (not recipe.memory.gradient_checkpointing, {"gradient_checkpointing": True}),
        (
            batch.batch_size % 2 == 0,
            {
                "batch_size": batch.batch_size // 2,
                "gradient_accumulation_steps": batch.gradient_accumulation_steps * 2,
            },
        ),
        (not recipe.lean.lean, {"lean": True}),
        (recipe.lean.lean and recipe.lean.checkpoints != "host", {"checkpoints": "host"}),
        (not recipe.lean.lean and not recipe.memory.activation_offloading, {"activation_offloading": True}),
    ]
    for applies, changes in order:
        if not applies:
            continue
        try:
            changed = replace_fields(recipe, changes)
        except QloraLowmemError:
            continue  # contradicts another field of this recipe
        return Retreat(changes, changed)
    return None


def start_again(arguments: Sequence[str], retreat: Retreat) -> NoReturn:
    """Replace this process by the command with the changes: a fresh process has the card's memory to itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [*words_of("train"), *arguments, *retreat.flags]
    os.execv(sys.executable, command)
