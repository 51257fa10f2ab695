"""Merge a trained adapter into its base model: 16-bit safetensors that any program loads without PEFT.

    qlora-lowmem merge --run outputs/optimised --to merged/optimised
    qlora-lowmem merge --run outputs/optimised/checkpoint-500 --to merged/step-500 --dtype fp16 --device cpu

The base model is read from its safetensors files a few rows at a time; on a GPU lie about 100 MiB, never the model.
The adapter was trained on 4-bit weights and is merged into the 16-bit ones that they were made of, so the merged model
says nearly, not exactly, what the 4-bit model with its adapter says. To stay in 4 bits, keep the adapter's folder:
PEFT loads it as it is, onto the base in 4 bits.

GGUF: the makers of llama.cpp ship no converter for pip, so none is called here. Theirs takes the merged folder:
python convert_hf_to_gguf.py merged/optimised
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lowmem.commands.frame import (
    Command,
    add_json_argument,
    check_json_target,
    check_new_folder,
    write_json,
)
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.run_folder.resumption import recipe_of_run
from qlora_lowmem.units import format_bytes

if TYPE_CHECKING:
    from qlora_lowmem.memory.profile import MemoryProfile

# What transformers' tokenizers are made of, and how a model speaks by default.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--run", required=True, metavar="FOLDER", help="a run's output folder, or one of its checkpoints"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where the merged model goes; made here")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="dtype of the merged weights")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="where it computes; auto is the GPU if any"
    )
    add_json_argument(parser, checked=False)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code, as `qlora_lowmem.train` does."""
    run, to = Path(options.run), check_new_folder("--to", options.to)
    check_json_target(options.json, coming=to)
    recipe = recipe_of_run(run)
    profile = merge_run(recipe, run, to, options.dtype, options.device, quiet=options.quiet)
    print(
        f"merged model in {to}: {options.dtype}, for AutoModelForCausalLM.from_pretrained({str(to)!r})", file=sys.stderr
    )
    if profile is not None:
        from qlora_lowmem.results.tables import phase_table

        print(phase_table(profile), file=sys.stderr)
    peaks = profile.to_dict() if profile else {"device": "cpu", "provenance": "measured"}
    content = {"merged": str(to), "dtype": options.dtype, "recipe_hash": recipe_hash(recipe)} | peaks
    write_json(options.json, content | {"environment": provenance_record(peaks["device"], peaks["provenance"])})
    return EXIT_OK


def merge_run(
    recipe: Recipe, run: Path, to: Path, dtype: str, device: str, *, quiet: bool = False
) -> "MemoryProfile | None":
    """Merge a run's adapter into a new folder `to`, which appears whole or not at all.

    Args:
        dtype: `bf16` or `fp16`.
        device: `cuda`, `cpu`, or `auto`.
        quiet: show no progress bar.

    Returns:
        The peak of the phase `merge`; None on a CPU.

    Raises:
        UsageError: random weights, another model's adapter, a file that cannot be read, no room on the disk.
        OutOfGpuMemoryError: the card has no room for a tile of rows.
        OutOfHostMemoryError: the machine has none for a shard.
    """
    import torch
    from safetensors import SafetensorError

    from qlora_lowmem.models import merging
    from qlora_lowmem.models.loading import weights_folder
    from qlora_lowmem.run.execute import OutOfGpuMemoryError, OutOfHostMemoryError, start_recorder
    from qlora_lowmem.run.job import apply_memory_limit
    from qlora_lowmem.run.out_of_memory import first_words, whose_memory
    from qlora_lowmem.run_folder.checkpoints import why_not_written

    if recipe.base.weights == "random":
        raise UsageError(
            "base.weights: the run trained on random weights, which were not kept; there is nothing to merge"
        )
    adapter = merging.Adapter.read(run)
    base = weights_folder(recipe, resolve_model(recipe.base.model, recipe.base.weights, recipe.base.revision))
    _check_room(to, merging.merged_bytes(base))
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
        _copy_rest(base, run, scratch, recipe, dtype)
        if to.is_dir():
            to.rmdir()
        scratch.rename(to)
    except (RuntimeError, MemoryError) as error:
        whose = whose_memory(error)
        if whose == "host":
            raise OutOfHostMemoryError(recipe, "merge", first_words(error)) from error
        if whose is None or recorder is None:
            raise
        raise OutOfGpuMemoryError("merge", first_words(error), recorder.profile()) from error
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


def _copy_rest(base: Path, run: Path, to: Path, recipe: Recipe, dtype: str) -> None:
    """Configuration from the base, tokenizer as it was trained with, and a word on what this is."""
    from qlora_lowmem.models.trusted import read_json

    config = read_json(base / "config.json", "Copy or fetch the base model's file again")
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", to / "generation_config.json")
    for name in _TOKENIZER:
        if (run / name).is_file():
            shutil.copyfile(run / name, to / name)
    source = resolve_model(recipe.base.model, recipe.base.weights, recipe.base.revision)
    text = (
        f"---\nbase_model: {source.hub_id or source.name}\ntags: [qlora, qlora_lowmem]\n---\n\n"
        f"# {recipe.name}, merged\n\n"
        f"`{recipe.base.model}` with the adapter of recipe `{recipe_hash(recipe)}` added into its weights, in {dtype}. "
        "The adapter was trained on the base in 4 bits.\n"
    )
    (to / "README.md").write_text(text, encoding="utf-8")


COMMAND = Command("merge", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
