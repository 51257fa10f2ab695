"""What else is asked of recipes on a card: their memory at each length, and in each phase of a run's life."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, shortened, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field
from qlora_lowmem.results.kinds.lengths import Length
from qlora_lowmem.results.kinds.phases import PhaseBytes, phase_bytes
from qlora_lowmem.scratch import scratch_folder
from qlora_lowmem.virtual_gpu import Launches


def measure_lengths(
    recipes: Sequence[Recipe], lengths: Sequence[int], card: virtual_gpu.Card, server: virtual_gpu.Server
) -> list[Length]:
    """Every recipe at every length, in that order.

    Raises:
        QloraLowmemError: a run fails.
    """
    room = roomy(card)
    submitted = [
        (recipe.name, length, submit_recipe(server, replace_field(shortened(recipe), "max_seq_length", length), room))
        for recipe in recipes
        for length in lengths
    ]
    rows = []
    for name, length, future in tqdm(submitted, desc="lengths", unit="run"):
        run = future.result()
        if run.profile is None or run.out_of_memory is not None:
            raise run.fault(f"{name} at {length:,} tokens fails")
        peak = run.profile.peak
        rows.append(
            Length(name, length, peak.device <= card.usable_bytes, peak, run.floor_bytes, run.micro_batch_launches)
        )
    return rows


@dataclass(frozen=True)
class Life:
    """A recipe's whole life on a card.

    Attributes:
        profile: the highest readings of each phase over all processes.
        out_of_memory: the phases in which memory ran out, with torch's message.
        floor_bytes: what no method of training the recipe avoids; 0 if training did not end.
    """

    recipe: Recipe
    profile: MemoryProfile
    out_of_memory: dict[str, str]
    floor_bytes: int

    def fits(self, card: virtual_gpu.Card) -> bool:
        """Whether every phase stays within what a job can count on there."""
        return not self.out_of_memory and self.profile.peak.device <= card.usable_bytes

    def phases(self, device_budget: int, allocated_budgets: Mapping[str, int] | None = None) -> tuple[PhaseBytes, ...]:
        """Its phases beside their budgets in bytes, as `phase_bytes` says."""
        profile, ran_out = self.profile, self.out_of_memory
        launches = {name: counted.total for name, counted in profile.launches.items()}
        return phase_bytes(profile.phases, device_budget, allocated_budgets, ran_out, self.floor_bytes, launches)


def live(recipe: Recipe, card: virtual_gpu.Card, server: virtual_gpu.Server) -> Life:
    """Run every phase of `recipe` on `card`, each process a fork of its own.

    Raises:
        QloraLowmemError: a part failed for another reason than memory.
    """
    parts: list[RecipeRun] = []
    with scratch_folder() as folder:
        for part in ("train", "resume", "merge"):
            arguments = {"content": recipe.to_dict(), "folder": str(folder), "part": part}
            job = server.submit("qlora_lowmem.plan.worker:live_here", arguments, card).result()
            if job.value is None:
                raise QloraLowmemError(
                    f"{recipe.name}: the part {part!r} failed: {job.error}\n{job.output_tail[-2000:]}"
                )
            parts.append(msgspec.convert(job.value, RecipeRun))
            if parts[-1].out_of_memory is not None:
                break  # what would come next needs what this part did not leave
    ran_out = {part.phase or "": part.out_of_memory for part in parts if part.out_of_memory is not None}
    return Life(recipe, _joined([part.profile for part in parts if part.profile]), ran_out, parts[0].floor_bytes)


def _joined(profiles: Sequence[MemoryProfile]) -> MemoryProfile:
    there = [name for name in PHASES if any(name in profile.phases for profile in profiles)]
    found = {name: Peak.highest(p.phases[name] for p in profiles if name in p.phases) for name in there}
    launches = {name: Launches.most(p.launches[name] for p in profiles if name in p.launches) for name in there}
    first = profiles[0]
    outside = max(profile.outside_allocator_bytes for profile in profiles)
    return MemoryProfile(first.device, first.provenance, first.total_bytes, outside, found, launches)
