"""A run's adapter as files: plain LoRA of the run's recipe, and what of the base the recipe trains, or refused. Tensors
decide; configuration is checked.

`adapter_config.json` is text that anyone can edit, and its `r` and `lora_alpha` scale every weight that is merged: what
it says is held against the shapes of the tensors and against the recipe that they were trained by.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS, FLOATS, check_adapter, read_json, reading
from qlora_lowmem.recipe import Recipe

ADAPTER_ADVICE = "Give the folder of another checkpoint of the run, or train again"
PREFIX = "base_model.model."  # of the base model's names in an adapter's file
ROWS = ".token_adapter.trainable_tokens_delta"  # the end of its names of rows of an embedding
# What of a PEFT configuration (peft/tuners/lora/config.py) changes the formula: these must be as LoRA's paper has them.
_PLAIN = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


@dataclass(frozen=True)
class AdapterFiles:
    """Names of tensors in an adapter's safetensors file.

    Attributes:
        modules: by module, its A (r, in_features) and its B (out_features, r).
        whole: by weight of the base, what takes its place.
        rows: by module of the base, rows (tokens, hidden) of its weight, and of which tokens.
    """

    modules: dict[str, tuple[str, str]]
    whole: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


def check_adapter_files(folder: Path, recipe: Recipe) -> AdapterFiles:
    """What is in an adapter's file.

    Raises:
        UsageError: there is no adapter, it cannot be read, it is more than plain LoRA on Linear modules, or it is not
            what the recipe trains.
    """
    check_adapter(folder)
    settings = _check_settings(folder / "adapter_config.json", recipe)
    whole: dict[str, str] = {}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    path = folder / ADAPTER_WEIGHTS
    halves: dict[str, dict[str, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with reading(path, ADAPTER_ADVICE), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
            module, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            part: Any = file.get_slice(key)
            name = key.removeprefix(PREFIX)
            if recipe.lora.modules_to_save and ".lora_" not in key and not name.endswith(ROWS):
                whole[name] = key
                continue
            if (recipe.lora.trainable_token_indices or recipe.data.added_tokens) and name.endswith(ROWS):
                module = name.removesuffix(ROWS)
                tokens = tuple(int(each) for each in settings["trainable_token_indices"][module])
                if len(tokens) != part.get_shape()[0]:
                    raise UsageError(f"{path}: {key} has not a row for each trained token. {ADAPTER_ADVICE}")
                rows[module] = (key, tokens)
                continue
            if half not in ("lora_A", "lora_B") or part.get_dtype() not in FLOATS:
                raise UsageError(f"{path}: {key} belongs to no LoRA adapter of a Linear module. {ADAPTER_ADVICE}")
            halves.setdefault(module, {})[half] = key
            shapes[key] = tuple(part.get_shape())
    if not halves:
        raise UsageError(f"{path} holds no weights. {ADAPTER_ADVICE}")
    rank = recipe.lora.lora_r
    for module, pair in halves.items():
        if len(pair) < 2:
            raise UsageError(f"{path}: of {module} only {min(pair)} is there. {ADAPTER_ADVICE}")
        a, b = shapes[pair["lora_A"]], shapes[pair["lora_B"]]
        if (len(a), len(b)) != (2, 2) or (a[0], b[1]) != (rank, rank):
            raise UsageError(
                f"{path}: the tensors of {module} are {a} and {b}, and lora.lora_r of the recipe is {rank}: they are "
                f"another run's. {ADAPTER_ADVICE}"
            )
    modules = {module: (pair["lora_A"], pair["lora_B"]) for module, pair in halves.items()}
    return AdapterFiles(modules, whole, rows)


def _check_settings(path: Path, recipe: Recipe) -> dict[str, Any]:
    settings = read_json(path, ADAPTER_ADVICE)
    if settings.get("peft_type") != "LORA":
        raise UsageError(
            f"{path}: peft_type is {settings.get('peft_type')!r}; a run's adapter is LORA. {ADAPTER_ADVICE}"
        )
    for name, plain in _PLAIN.items():
        if settings.get(name, plain) != plain:
            raise UsageError(
                f"{path}: {name} is {settings[name]!r}; only plain LoRA adapters can be read here, as a run "
                "writes them. PEFT itself reads the others (merge_and_unload merges them)"
            )
    trained = {"r": recipe.lora.lora_r, "lora_alpha": recipe.lora.lora_alpha, "use_rslora": recipe.lora.use_rslora}
    for name, value in trained.items():
        found = settings.get(name, False if name == "use_rslora" else None)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise UsageError(
                f"{path}: {name} is {found!r}, and the recipe trained with {value!r}: the adapter would be scaled by "
                f"another factor. Put {value!r} back, or: {ADAPTER_ADVICE[0].lower()}{ADAPTER_ADVICE[1:]}"
            )
    return settings
