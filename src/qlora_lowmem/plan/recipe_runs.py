"""Recipes run on virtual cards, many in one go: heavy imports are made once, then every run is a fork of its own."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.profile import MemoryProfile, Peak
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field, replace_fields
from qlora_lowmem.run.imports import heavy_imports
from qlora_lowmem.virtual_gpu.cards import MOST_BYTES

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RecipeRun:
    """What a recipe came to on a virtual card; `msgspec` makes its JSON, and reads it.

    Attributes:
        profile: the peaks; None if it failed for another reason than memory.
        out_of_memory: torch's message if it ran out, and then `profile` holds the peaks until there.
        phase: the phase in which it ran out.
        failure: what went wrong otherwise; of a refused recipe, what a person is told.
        bad_input: it is the recipe that was refused, or its model.
        trainable_parameters: of the adapters; 0 if it never got so far.
        floor_bytes: what no method of training this recipe avoids; 0 if it never ended a step.
        pinned_host_bytes: the most host memory that was page-locked at once.
        refused: the card had no more to give at some moment, and the allocator gave back what it kept; with more memory
            the peaks may be others.
        stopped: it was ended once the card held more than it may, and `profile` holds the peaks until there.
        flops: of a micro-batch, if they were asked for; 0 if they were not, or it did not end well.
        attribution: the steady step's peak by kind, if it was asked for and the run ended well.
    """

    profile: MemoryProfile | None
    out_of_memory: str | None = None
    phase: str | None = None
    failure: str | None = None
    bad_input: bool = False
    trainable_parameters: int = 0
    floor_bytes: int = 0
    pinned_host_bytes: int = 0
    refused: bool = False
    stopped: bool = False
    flops: int = 0
    attribution: Attribution | None = None

    @property
    def peak(self) -> Peak:
        """The highest of all phases; zeros where it failed."""
        return self.profile.peak if self.profile is not None else Peak()

    @property
    def step_launches(self) -> int | None:
        """Kernels, copies and memsets of a steady optimizer step; None where none ended."""
        launches = self.profile.step_launches if self.profile is not None else None
        return launches.total if launches is not None else None

    @property
    def micro_batch_launches(self) -> int | None:
        """The same of a step's last micro-batch alone."""
        launches = self.profile.micro_batch_launches if self.profile is not None else None
        return launches.total if launches is not None else None

    def launches_over(self, base: "RecipeRun") -> float | None:
        """Those over another's; None where one is not known."""
        here, there = self.step_launches, base.step_launches
        return here / there if here is not None and there else None

    def fault(self, what: str) -> QloraLowmemError:
        """What to raise of a run that failed for another reason than memory; `what` begins it, where it is ours."""
        text = (self.failure or self.out_of_memory or "no output").strip()
        return UsageError(text) if self.bad_input else QloraLowmemError(f"{what}: {text.splitlines()[-1]}")


def two_steps(recipe: Recipe) -> Recipe:
    """`recipe` with two optimizer steps: the second has all there is, and no later one needs more."""
    warmup = min(recipe.optimizer.warmup_steps, 2)  # a longer one would contradict
    return replace_fields(recipe, {"max_steps": 2, "warmup_steps": warmup})


def shortened(recipe: Recipe) -> Recipe:
    """The two steps with two micro-batches at most: as much memory from less work.

    From the second micro-batch of a step on, gradients are there from the start: more would show nothing new, but for
    the micro-batches that wait on the card (24 bytes a token each: ids, mask and labels).
    """
    micro_batches = min(recipe.batch.gradient_accumulation_steps, 2)
    return replace_field(two_steps(recipe), "gradient_accumulation_steps", micro_batches)


def roomy(card: virtual_gpu.Card) -> virtual_gpu.Card:
    """A card of the same kind with room for everything: what a recipe needs there, it needs.

    No recipe of any model here needs as much.
    """
    return card.with_memory(MOST_BYTES)


def import_what_runs_need() -> None:
    """In the process that runs are forked from: the heavy libraries, with no more than a run needs, the worker, and
    what each run would import or work out by itself.
    """
    with heavy_imports():
        for name in ("datasets", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion"):
            import_module(name)
        import_module("transformers.integrations.bitsandbytes")
        import_module("qlora_lowmem.plan.worker")
        # Compiles the patterns of every model's names, and keeps them.
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")


def recipe_server(max_workers: int = 2) -> virtual_gpu.Server:
    """A server of virtual runs with everything imported that a recipe needs."""
    return virtual_gpu.Server(preload=[f"{__name__}:import_what_runs_need"], max_workers=max_workers)


def submit_recipe(
    server: virtual_gpu.Server,
    recipe: Recipe,
    card: virtual_gpu.Card,
    timeout: float | None = None,
    attribute: bool = False,
    snapshot: Path | None = None,
    brief: bool = False,
    most: int | None = None,
    count: bool = False,
) -> "Future[RecipeRun]":
    """Queue `recipe`'s training steps on `card`; synthetic data, every sample at full length.

    Args:
        attribute: say where the bytes of the peak are.
        snapshot: with `attribute`, write the allocator's snapshot there.
        brief: leave out micro-batches that would do again what an earlier one of their step did: the same peaks.
        most: bytes that the card may hold; with `brief`, a run that takes more is stopped.
        count: once training has ended, count the FLOPs of one micro-batch more.
    """
    if recipe.data.data != "synthetic":
        recipe = replace_field(recipe, "data", "synthetic")
    arguments = {"content": recipe.to_dict(), "attribute": attribute, "snapshot": str(snapshot) if snapshot else None}
    arguments |= {"brief": brief, "most": most, "count": count}
    return mapped(server.submit("qlora_lowmem.plan.worker:run_here", arguments, card, timeout=timeout), _run_of)


def mapped(future: "Future[Any]", change: Callable[[Any], Answer]) -> "Future[Answer]":
    """A future of `change` of the other's result; whatever ended the one ends the other."""
    result: Future[Answer] = Future()

    def done(first: "Future[Any]") -> None:
        try:
            result.set_result(change(first.result()))
        except BaseException as error:  # handed to whoever waits
            result.set_exception(error)

    future.add_done_callback(done)
    return result


def _run_of(job: virtual_gpu.JobResult) -> RecipeRun:
    if job.value is None:
        return RecipeRun(None, failure=f"the run ended with exit code {job.exit_code}: {job.output_tail[-2000:]}")
    return replace(msgspec.convert(job.value, RecipeRun), pinned_host_bytes=job.report.peak_pinned_host_bytes)
