"""Runs on virtual cards, each made once: asked of this process first, then of the cache, then of the server.

The cache keeps them by what they were made from: recipe, card, versions, and this package's own code.
"""

import functools
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

import qlora_lowmem
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import versions
from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.files import cache_folder, write_whole
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import Answer, RecipeRun, mapped, roomy, submit_recipe, two_steps
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.recipe.io import replace_fields

# Rooms whose code no run comes to: they ask for runs, or show what came of them.
_NOT_RUN = {"commands", "gate", "results", "watch", "__pycache__"}
_SUFFIXES = {".py", ".cpp", ".h", ".toml", ".json"}
# FLOPs grow with the sequence in each recipe alike; a short one says how they compare.
COUNTED_TOKENS = 1024

Question = Literal["attributed run", "counted run", "run", "probe"]
_ANSWERED_BY: dict[str, tuple[Question, ...]] = {
    "run": ("attributed run", "counted run"),
    "probe": ("attributed run", "counted run", "run"),
}


class _Kept(msgspec.Struct):
    """A file of the cache; the digest is that of the answer's JSON."""

    sha256: str
    answer: msgspec.Raw


class RunCache:
    """Answers by key, a JSON file each; a folder that cannot be written is said once and then done without."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of_this_user(cls) -> "RunCache":
        """In the user's cache folder; where others could have written that, it is said and nothing is kept."""
        try:
            return cls(cache_folder("plan"))
        except UsageError as error:
            print(f"plan: {error}; nothing is cached", file=sys.stderr)
            return cls(None)

    def get(self, key: str, kind: type[Answer]) -> Answer | None:
        """What was kept under `key`; None if nothing was, or if it is damaged by as much as a bit."""
        if self._folder is None:
            return None
        try:
            kept = msgspec.json.decode(self._path(self._folder, key).read_bytes(), type=_Kept)
            return msgspec.json.decode(kept.answer, type=kind) if kept.sha256 == _digest(kept.answer) else None
        except (OSError, ValueError):
            return None

    def put(self, key: str, answer: object) -> None:
        """Keep `answer` under `key`, whole or not at all."""
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = msgspec.json.encode(answer)
            write_whole(path, msgspec.json.encode(_Kept(_digest(content), msgspec.Raw(content))))
        except OSError as error:
            print(f"plan: {self._folder} cannot be written ({error.strerror}); nothing is cached", file=sys.stderr)
            self._folder = None

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def _digest(content: bytes | msgspec.Raw) -> str:
    return hashlib.sha256(content).hexdigest()


def run_key(question: str, recipe: Recipe, card: virtual_gpu.Card) -> str:
    """The key of what a run of `recipe` on `card` answers to `question`: equal keys are equal answers."""
    figures = {each.name: getattr(card, each.name) for each in fields(card) if each.name != "sources"}
    content = [question, recipe_hash(recipe), _model_content(recipe), figures, versions(), _source_hash()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _model_content(recipe: Recipe) -> Any:
    """What the model's name leads to now: a folder or a file may change under its name."""
    source = source_of(recipe)
    if source.gguf is None:
        return source.architecture
    status = source.gguf.stat()
    return [status.st_size, status.st_mtime_ns]


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    root = Path(qlora_lowmem.__file__).parent
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix in _SUFFIXES and not _NOT_RUN & set(inside.parts):
            digest.update(str(inside).encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Tally:
    """How many runs one plan needed beyond those that this process had made, and how many of them the cache had."""

    asked: int = 0
    cached: int = 0


class Runs:
    """What every plan of a process shares."""

    def __init__(self, server: virtual_gpu.Server, cache: RunCache, note: Callable[[], object] = lambda: None) -> None:
        self._server = server
        self._cache = cache
        self._note = note
        self._lock = threading.Lock()
        self._made: dict[str, Future[Any]] = {}

    def submit(
        self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally, question: Question = "run"
    ) -> "Future[RecipeRun]":
        """The recipe's steps on the card, as `submit_recipe`, briefly. What answers more is not run again.

        Args:
            question: `run`; `attributed run`, which says by kind what the card held; `counted run`, which spares
                `count_flops` one; or `probe`, whether it fits, which ends once it is known not to.
        """
        if question == "counted run" and _counted(recipe) != _counted(recipe, as_it_is=True):
            question = "run"
        count = question == "counted run"
        with self._lock:
            for fuller in _ANSWERED_BY.get(question, ()):
                made = self._made.get(run_key(fuller, recipe, card))
                if made is not None:
                    return made

        def run() -> "Future[RecipeRun]":
            most = card.usable_bytes if question == "probe" else None
            attribute = question == "attributed run"
            return submit_recipe(self._server, recipe, card, attribute=attribute, brief=True, most=most, count=count)

        answer = self._answer(question, recipe, card, tally, RecipeRun, run)
        if count:
            key = run_key("flops", _counted(recipe), roomy(card))
            self._made.setdefault(key, mapped(answer, lambda run: run.flops))
        return answer

    def count_flops(self, recipe: Recipe, card: virtual_gpu.Card, tally: Tally) -> "Future[int]":
        """FLOPs of one micro-batch of one sample of the recipe, of 1,024 tokens at most, on a card with room for it.

        The Mamba-2 scan is counted in plain PyTorch: Triton kernels have no formula.
        """
        short, card = _counted(recipe), roomy(card)

        def run() -> "Future[int]":
            job = self._server.submit("qlora_lowmem.plan.worker:count_here", {"content": short.to_dict()}, card)
            return mapped(job, _value_of)

        return self._answer("flops", short, card, tally, int, run)

    def _answer(
        self,
        question: str,
        recipe: Recipe,
        card: virtual_gpu.Card,
        tally: Tally,
        kind: type[Answer],
        run: "Callable[[], Future[Answer]]",
    ) -> "Future[Answer]":
        key = run_key(question, recipe, card)
        with self._lock:
            if key in self._made:
                return self._made[key]
            tally.asked += 1
            kept = self._cache.get(key, kind)
            if kept is not None:
                tally.cached += 1
                answer: Future[Answer] = Future()
                answer.set_result(kept)
            else:
                answer = run()
                answer.add_done_callback(lambda done: self._keep(key, done))
            self._made[key] = answer
        return answer

    def _keep(self, key: str, done: "Future[Any]") -> None:
        if done.exception() is None and not getattr(done.result(), "failure", None):
            self._cache.put(key, done.result())
        self._note()


def _counted(recipe: Recipe, *, as_it_is: bool = False) -> Recipe:
    """What is counted of a recipe; `as_it_is`, one step of it as long and as wide as it is."""
    one: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_steps": 1, "warmup_steps": 0}
    if not as_it_is:
        one |= {"batch_size": 1, "scan": "plain", "max_seq_length": min(recipe.batch.max_seq_length, COUNTED_TOKENS)}
    return replace_fields(two_steps(recipe), one)


def _value_of(job: virtual_gpu.JobResult) -> int:
    if job.value is None:
        raise QloraLowmemError(f"counting FLOPs failed: {job.error or job.output_tail[-500:]}")
    return int(job.value)
