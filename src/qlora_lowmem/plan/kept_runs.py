"""Runs on virtual cards, each made once: asked of this process first, then of the cache, then of the server."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.plan.cache import RunCache, run_key
from qlora_lowmem.plan.recipe_runs import RecipeRun, submit_recipe, two_steps
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields

# FLOPs grow with the sequence in each recipe alike; a short one says how they compare.
COUNTED_TOKENS = 1024


@dataclass
class Tally:
    """How many runs one plan needed beyond those that this process had made, and how many of them the cache had."""

    asked: int = 0
    cached: int = 0


class Runs:
    """What every plan of a process shares."""

    def __init__(self, server: virtual_gpu.Server, cache: RunCache, note: Callable[[], None] = lambda: None) -> None:
        self._server = server
        self._cache = cache
        self._note = note
        self._lock = threading.Lock()
        self._made: dict[str, Future[dict[str, Any]]] = {}

    def submit(
        self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally, attribute: bool = False
    ) -> "Future[RecipeRun]":
        """The recipe's steps on the card, as `submit_recipe`."""

        def run() -> "Future[dict[str, Any]]":
            return _mapped(submit_recipe(self._server, recipe, card, attribute=attribute), RecipeRun.to_dict)

        answer = self._answer("attributed run" if attribute else "run", recipe, card, tally, run)
        return _mapped(answer, RecipeRun.from_dict)

    def count_flops(self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally) -> "Future[int]":
        """FLOPs of one micro-batch of one sample of the recipe, of 1,024 tokens at most, on a card with room for it.

        The Mamba-2 scan is counted in plain PyTorch: Triton kernels have no formula.
        """
        length = min(recipe.batch.max_seq_length, COUNTED_TOKENS)
        one = {"max_seq_length": length, "batch_size": 1, "gradient_accumulation_steps": 1, "scan": "plain"}
        short = replace_fields(two_steps(recipe), one | {"max_steps": 1, "warmup_steps": 0})

        def run() -> "Future[dict[str, Any]]":
            job = self._server.submit("qlora_lowmem.plan.flops:count_here", {"content": short.to_dict()}, card)
            return _mapped(job, _value_of)

        return _mapped(self._answer("flops", short, card, tally, run), lambda content: int(content["flops"]))

    def _answer(
        self,
        question: str,
        recipe: Recipe,
        card: virtual_gpu.Card,
        tally: Tally,
        run: "Callable[[], Future[dict[str, Any]]]",
    ) -> "Future[dict[str, Any]]":
        key = run_key(question, recipe, card)
        with self._lock:
            if key in self._made:
                return self._made[key]
            tally.asked += 1
            kept = self._cache.get(key)
            if kept is not None:
                tally.cached += 1
                answer: Future[dict[str, Any]] = Future()
                answer.set_result(kept)
            else:
                answer = run()
                answer.add_done_callback(lambda done: self._keep(key, done))
            self._made[key] = answer
        return answer

    def _keep(self, key: str, done: "Future[dict[str, Any]]") -> None:
        if done.exception() is None and not done.result().get("failure"):
            self._cache.put(key, done.result())
        self._note()


def _value_of(job: virtual_gpu.JobResult) -> dict[str, Any]:
    if job.value is None:
        raise QloraLowmemError(f"counting FLOPs failed: {job.error or job.output_tail[-500:]}")
    return dict(job.value)


def _mapped(future: "Future[Any]", change: Callable[[Any], Any]) -> "Future[Any]":
    """A future of `change` of the other's result."""
    result: Future[Any] = Future()

    def done(first: "Future[Any]") -> None:
        try:
            result.set_result(change(first.result()))
        except BaseException as error:  # handed to whoever waits
            result.set_exception(error)

    future.add_done_callback(done)
    return result
