"""A run's adapter merged into its base model: a folder that any program loads, whole or not at all."""

import json
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError

from qlora_lowmem.errors import UsageError
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.models import merging
from qlora_lowmem.models.loading import skeleton, weights_folder
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.models.trusted import read_json
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.run.job import apply_memory_limit, start_recorder
from qlora_lowmem.run.out_of_memory import raise_if_out_of_memory
from qlora_lowmem.run_folder.checkpoints import why_not_written
from qlora_lowmem.run_folder.ownership import TOKENIZER_FILES
from qlora_lowmem.units import format_bytes

# What of a base model's folder stays as it is: how to generate, and how a wrapper's processor takes pictures and sound.
_BESIDE_WEIGHTS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def merge_run(
    recipe: Recipe, run: Path, to: Path, dtype: str, device: str, *, quiet: bool = False
) -> MemoryProfile | None:
    """Merge a run's adapter into a new folder `to`, which appears whole or not at all.

    Args:
        dtype: `bf16` or `fp16`.
        device: `cuda`, `cpu`, or `auto`.

    Returns:
        The peak of the phase `merge`; None on a CPU.

    Raises:
        UsageError: random weights, another model's adapter, a file that cannot be read, no room on the disk.
        OutOfGpuMemoryError, OutOfHostMemoryError: no room for a tile of rows on the card, for a shard on the machine.
    """
    if recipe.base.weights == "random":
        raise UsageError(
            "base.weights: the run trained on random weights, which were not kept; there is nothing to merge"
        )
    source = source_of(recipe)
    model, base = skeleton(recipe, source), weights_folder(recipe, source)
    adapter = merging.Adapter.read(run, recipe).of(model).in_names_of(base, model)
    _check_room(to, merging.merged_bytes(base, adapter))
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    recorder = start_recorder(recipe) if on_gpu else None
    scratch = to.with_name(f".{to.name}.merging")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        if recorder is not None:
            apply_memory_limit(recipe, recorder)
            recorder.begin("merge")
        where = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        merging.merge(base, adapter, scratch, merging.DTYPES[dtype], where, quiet=quiet)
        vocabulary = int(model.config.get_text_config().vocab_size) if recipe.data.added_tokens else None
        _copy_rest(base, run, scratch, recipe, dtype, vocabulary)
        scratch.rename(to)  # in the place of an empty folder too
    except (RuntimeError, MemoryError) as error:
        raise_if_out_of_memory(error, recipe, "merge", recorder)
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--to: {str(to)!r} cannot be written ({why_not_written(error) or error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return recorder.profile() if recorder is not None else None


def _check_room(to: Path, needed: int) -> None:
    parent = next(folder for folder in to.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"--to: the merged model takes {format_bytes(needed)}, and {str(parent)!r} has {format_bytes(free)} free; "
            "make room, or give a folder on another disk"
        )


def _copy_rest(base: Path, run: Path, to: Path, recipe: Recipe, dtype: str, vocabulary: int | None) -> None:
    """Configuration from the base, tokenizer as it was trained with, and a word on what this is.

    Args:
        vocabulary: rows of the embedding, where tokens were added; None leaves the configuration's.
    """
    config = read_json(base / "config.json", "Copy or fetch the base model's file again")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    if vocabulary is not None:
        config.get("text_config", config)["vocab_size"] = vocabulary
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _BESIDE_WEIGHTS:
        if (base / name).is_file():
            shutil.copyfile(base / name, to / name)
    for path in chain.from_iterable(map(run.glob, TOKENIZER_FILES)):
        if path.is_file():
            shutil.copyfile(path, to / path.name)
    source = source_of(recipe)
    text = (
        f"---\nbase_model: {source.hub_id or source.name}\ntags: [qlora, qlora_lowmem]\n---\n\n"
        f"# {recipe.name}, merged\n\n"
        f"`{recipe.base.model}` with the adapter of recipe `{recipe_hash(recipe)}` added into its weights, in {dtype}. "
        "The adapter was trained on the base in 4 bits.\n"
    )
    (to / "README.md").write_text(text, encoding="utf-8")
