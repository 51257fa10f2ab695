"""The runs that the statements are tested on, each once: named changes of the shipped recipes."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from tqdm.auto import tqdm

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.recipe_runs import RecipeRun, roomy, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe

HYBRID, DENSE_1B, DENSE_3B = "granite-4.0-h-1b", "granite-4.0-1b", "llama-3.2-3b"
TITLES = {HYBRID: "Granite-4.0-H-1B", DENSE_1B: "Granite-4.0-1B (dense)", DENSE_3B: "Llama-3.2-3B (dense)"}
# PyTorch has flash attention from compute capability 8.0 on; this card has 7.5.
WITHOUT_FLASH = "t4-16gb"


@dataclass(frozen=True)
class Case:
    """A change of a shipped recipe.

    Attributes:
        recipe: the file it starts from.
        changes: fields by leaf name.
        card: a kind of card; its memory is as much as the run needs.
        attribute: whether its peak is wanted by kind.
    """

    recipe: str
    changes: Mapping[str, object]
    card: str = DEFAULT_CARD
    attribute: bool = False


BASELINE, OPTIMISED = "baseline", "optimised"
# Of every model.
_COMMON = {
    BASELINE: Case(BASELINE, {}, attribute=True),
    "r 8": Case(BASELINE, {"lora_r": 8, "lora_alpha": 16}, attribute=True),
    "seq 1024": Case(BASELINE, {"max_seq_length": 1024}, attribute=True),
    "eager": Case(BASELINE, {"attention": "eager"}, attribute=True),
    "eager, seq 1024": Case(BASELINE, {"attention": "eager", "max_seq_length": 1024}, attribute=True),
    "checkpointing": Case(BASELINE, {"gradient_checkpointing": True}, attribute=True),
    OPTIMISED: Case(OPTIMISED, {}, attribute=True),
    "all-linear": Case(OPTIMISED, {"target_modules": "all-linear"}, attribute=True),
    "optimised, seq 2048": Case(OPTIMISED, {"max_seq_length": 2048}),
    "no flash": Case(BASELINE, {}, WITHOUT_FLASH, attribute=True),
    "no flash, seq 1024": Case(BASELINE, {"max_seq_length": 1024}, WITHOUT_FLASH, attribute=True),
    "q and v": Case(OPTIMISED, {"target_modules": "attention-qv"}),
    "seq 512": Case(OPTIMISED, {"max_seq_length": 512}),
    "seq 256": Case(OPTIMISED, {"max_seq_length": 256}),
    "r 4": Case(OPTIMISED, {"lora_r": 4, "lora_alpha": 8}),
    "accumulation 8": Case(OPTIMISED, {"gradient_accumulation_steps": 8}),
    "accumulation 16": Case(OPTIMISED, {"gradient_accumulation_steps": 16}),
    "batch 8": Case(OPTIMISED, {"batch_size": 8, "gradient_accumulation_steps": 1}),
    "pinned, 2 workers": Case(OPTIMISED, {"pin_memory": True, "dataloader_workers": 2}),
}
# The least that trains: one adapter of rank 1, on the first module that has one in the case beside it.
_FIRST_OF_ATTENTION = {HYBRID: "layers.5.self_attn.q_proj"}
_FIRST_OF_ALL = {HYBRID: "layers.0.mamba.in_proj"}
_FIRST = "layers.0.self_attn.q_proj"
ONE_ADAPTER, OPTIMISED_ONE_ADAPTER = "one adapter", "optimised, one adapter"


def _one_adapter(recipe: str, module: str) -> Case:
    return Case(recipe, {"lora_r": 1, "lora_alpha": 2, "target_modules": [module]}, attribute=True)


# Of a model whose attention keeps packed samples apart: the others' recipes refuse it.
_PACKED = Case(OPTIMISED, {"packing": True})
CASES: dict[tuple[str, str], Case] = {
    **{(model, name): case for model in TITLES for name, case in _COMMON.items()},
    **{(model, ONE_ADAPTER): _one_adapter(BASELINE, _FIRST_OF_ATTENTION.get(model, _FIRST)) for model in TITLES},
    **{(model, OPTIMISED_ONE_ADAPTER): _one_adapter(OPTIMISED, _FIRST_OF_ALL.get(model, _FIRST)) for model in TITLES},
    (DENSE_3B, "packing"): _PACKED,
}


def recipe_of(model: str, case: Case) -> Recipe:
    """The recipe of a case; two micro-batches a step unless the case says otherwise.

    Two are as good as eight for a peak: gradients of the first are there when the second comes.
    """
    changes = {"model": model, "gradient_accumulation_steps": 2} | dict(case.changes)
    return load_recipe(RECIPES / f"{case.recipe}.yaml", changes)


class Runs:
    """The results of every case: `runs.steady(model, name)` and its like wait for the run and read a figure."""

    def __init__(self, results: Mapping[tuple[str, str], RecipeRun]) -> None:
        self._results = results

    def run(self, model: str, name: str) -> RecipeRun:
        """The run itself, however it ended."""
        return self._results[model, name]

    def profile(self, model: str, name: str) -> MemoryProfile:
        """Its peaks.

        Raises:
            RuntimeError: it failed.
        """
        run = self.run(model, name)
        if run.profile is None or run.failure or run.out_of_memory:
            raise RuntimeError(f"{name} on {model} did not end well: {run.failure or run.out_of_memory}")
        return run.profile

    def steady(self, model: str, name: str) -> int:
        """Allocated bytes at the peak of the second step: all there is, without what only the first one does."""
        return self.profile(model, name).phases["steady"].allocated

    def attribution(self, model: str, name: str) -> Attribution:
        """The steady peak by kind.

        Raises:
            RuntimeError: it failed, or was not asked for.
        """
        self.profile(model, name)
        found = self.run(model, name).attribution
        if found is None:
            raise RuntimeError(f"{name} on {model} ran without attribution")
        return found

    def kinds(self, model: str, name: str, *kinds: str) -> int:
        """Bytes of these kinds at the steady peak."""
        found = self.attribution(model, name).kinds
        return sum(found.get(kind, 0) for kind in kinds)


WEIGHTS = ("weights_4bit", "quantisation", "weights_other")
ADAPTERS = ("adapters", "gradients", "optimizer")


def run_all(server: virtual_gpu.Server) -> Runs:
    """Every case on its card, with a progress bar."""
    futures: dict[tuple[str, str], Future[RecipeRun]] = {}
    for (model, name), case in CASES.items():
        card = roomy(virtual_gpu.get_card(case.card))
        recipe = recipe_of(model, case)
        futures[model, name] = submit_recipe(server, recipe, card, timeout=300, attribute=case.attribute)
    bar = tqdm(futures.items(), desc="claims", unit="run")
    return Runs({key: future.result() for key, future in bar})


def attention_layers(model: str) -> tuple[int, int]:
    """How many layers of `model` have attention, and how many there are."""
    content = architecture(model)
    layers = int(content["num_hidden_layers"])
    types = content.get("layer_types", ["attention"] * layers)
    return types.count("attention"), layers
