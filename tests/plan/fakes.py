"""Runs that are a formula, for planning without a card: need is a line in tokens, by what the recipe keeps."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.plan.kept_runs import Question, Tally
from qlora_lowmem.plan.recipe_runs import RecipeRun
from qlora_lowmem.recipe import Recipe

MIB = 2**20
BASE = 1500 * MIB


def need_of_tokens(recipe: Recipe) -> int:
    """Bytes: a base, a slope by the rung, and 24 bytes a token for each micro-batch that waits."""
    tokens = recipe.batch.max_seq_length * recipe.batch.batch_size
    slope = 6 * MIB
    if recipe.memory.gradient_checkpointing:
        slope = MIB
    if recipe.memory.activation_offloading:
        slope = MIB // 2
    if recipe.lean.lean:
        slope = {"layer": MIB // 4, "segments": MIB // 8, "host": MIB // 16}[recipe.lean.checkpoints]
    smaller = {"none": 0, "8bit": 140 * MIB, "4bit": 220 * MIB}[recipe.lean.quantised_embeddings]
    waiting = 24 * tokens * max(recipe.batch.gradient_accumulation_steps - 2, 0)
    return BASE - smaller + slope * tokens + waiting


@dataclass
class FakeRuns:
    """Answers like `Runs`, from a formula."""

    need: Callable[[Recipe], int] = need_of_tokens
    asked: list[Recipe] = field(default_factory=list)
    failure: str | None = None
    cards: list[virtual_gpu.Card] = field(default_factory=list)
    without: tuple[str, ...] = ()

    def submit(
        self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally, question: Question = "run"
    ) -> "Future[RecipeRun]":
        """The formula's need, or out of memory where the card has less; fails where `without` has the question."""
        tally.asked += 1
        self.asked.append(recipe)
        self.cards.append(card)
        needed = self.need(recipe)
        peak = Peak(needed, needed, min(needed, card.total_bytes))
        profile = MemoryProfile(card.name, "virtual", card.total_bytes, 0, {"steady": peak})
        message = "CUDA out of memory." if needed > card.total_bytes else None
        failure = "no such answer" if question in self.without else self.failure
        run = RecipeRun(None if failure else profile, message, failure=failure, trainable_parameters=1000)
        return _done(run)

    def count_flops(self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally) -> "Future[int]":
        """Half as many again where layers run forward twice."""
        del card
        tally.asked += 1
        if "flops" in self.without:
            failed: Future[Any] = Future()
            failed.set_exception(QloraLowmemError("counting FLOPs failed: CUDA out of memory."))
            return failed
        return _done(3 if recipe.memory.gradient_checkpointing else 2)


def _done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future
