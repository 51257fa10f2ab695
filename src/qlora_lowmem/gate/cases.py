"""Benchmark cases: a recipe on a card, run once, whoever asks for it and however often."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import versions
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT
from qlora_lowmem.gate.records import key_of, record_of
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.profile import MemoryProfile, provenance_here
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results.kinds.matrix import CaseResult
from qlora_lowmem.results.kinds.verdicts import Record
from qlora_lowmem.scratch import scratch_folder


def recipe_record(result: CaseResult) -> Record:
    """The record of a run that has a profile."""
    assert result.profile is not None
    found = versions()
    allocator = f"expandable_segments:{result.recipe.memory.expandable_segments}"  # as `job.start_recorder` pins it
    key = key_of(result.card, result.provenance, allocator, found, result.recipe_hash)
    return record_of(key, result.profile, versions=found)


class VirtualRunner:
    """Cases on a virtual card, each a process of its own."""

    def __init__(self, server: virtual_gpu.Server, card: virtual_gpu.Card) -> None:
        self._server, self._card = server, card
        self._waiting = ThreadPoolExecutor(max_workers=32, thread_name_prefix="cases")

    def submit(self, recipe: Recipe) -> "Future[CaseResult]":
        """Run on the card and, if it is too small, on a roomy one of its kind."""
        return self._waiting.submit(self._result, recipe, submit_recipe(self._server, recipe, self._card))

    def attribute(self, result: CaseResult, snapshot: Path | None) -> Attribution | None:
        """Run the case again, on a roomy card if it does not fit, attribute its peak and write the `snapshot` there."""
        card = self._card if result.out_of_memory is None else roomy(self._card)
        return submit_recipe(self._server, result.recipe, card, attribute=True, snapshot=snapshot).result().attribution

    def _result(self, recipe: Recipe, first: "Future[RecipeRun]") -> CaseResult:
        run = found = first.result()
        if run.out_of_memory is not None:
            found = submit_recipe(self._server, recipe, roomy(self._card)).result()
        profile = found.profile if found.out_of_memory is None else None
        return CaseResult(
            recipe,
            self._card.name,
            "virtual",
            fits=found is run and profile is not None and profile.peak.device <= self._card.usable_bytes,
            profile=profile,
            out_of_memory=run.out_of_memory,
            failure=found.failure,
            trainable_parameters=found.trainable_parameters,
            floor_bytes=found.floor_bytes,
        )


class GpuRunner:
    """Cases on the GPU of this machine, one process at a time, by the command that people use.

    In a process on a virtual GPU that is the GPU, and its figures say so: a rehearsal of what a real one will run.
    """

    def __init__(self, vram_cap: str | None = None) -> None:
        self._limit = ["--max-memory", vram_cap] if vram_cap else []

    def submit(self, recipe: Recipe) -> "Future[CaseResult]":
        """Run now: a GPU's memory is measured with one job on it."""
        result: Future[CaseResult] = Future()
        case = self._run(recipe, self._limit)
        if case.out_of_memory is not None:
            needs = self._run(recipe, []) if self._limit else None
            case = replace(case, profile=needs.profile if needs is not None and needs.fits else None)
        result.set_result(case)
        return result

    def attribute(self, _result: CaseResult, _snapshot: Path | None) -> Attribution | None:
        """None: `python -m qlora_lowmem.explain --device cuda` attributes on a real GPU."""
        return None

    def _run(self, recipe: Recipe, limit: Sequence[str]) -> CaseResult:
        with scratch_folder() as folder:
            config, summary = folder / f"{recipe.name}.yaml", folder / "summary.json"
            config.write_text(recipe.to_yaml(), encoding="utf-8")
            command = [sys.executable, "-m", "qlora_lowmem.train", "--config", str(config), "--device", "cuda"]
            command += ["--output-dir", str(folder / "out"), "--data", "synthetic", "--quiet", "--no-advice"]
            done = subprocess.run(
                [*command, "--json", str(summary), *limit], capture_output=True, text=True, check=False
            )
            if done.returncode not in (0, EXIT_DOES_NOT_FIT) or not summary.is_file():
                last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
                return CaseResult(recipe, "cuda", provenance_here(), fits=False, profile=None, failure=last[0])
            content = json.loads(summary.read_text(encoding="utf-8"))
        return CaseResult(
            recipe,
            content["device"],
            content["provenance"],
            fits=content["fits"],
            profile=MemoryProfile.from_dict(content),
            out_of_memory=None if content["fits"] else content["failure"]["message"],
            trainable_parameters=content.get("trainable_parameters", 0),
            floor_bytes=content.get("floor_bytes", 0),
        )


Runner = VirtualRunner | GpuRunner
Matrix = Mapping[str, "Future[CaseResult]"]  # results by recipe
