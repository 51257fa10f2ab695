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
import sys
from pathlib import Path

from qlora_lowmem.commands.frame import add_json_argument, check_json_target, write_json
from qlora_lowmem.environment import provenance_record, share_cores
from qlora_lowmem.errors import EXIT_OK
from qlora_lowmem.recipe import recipe_hash
from qlora_lowmem.results.tables import phase_table
from qlora_lowmem.run_folder.ownership import recipe_of_run
from qlora_lowmem.signals import importing
from qlora_lowmem.targets import check_new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    folder, to = Path(options.run), check_new_folder("--to", options.to)
    check_json_target(options.json, coming=to)
    recipe = recipe_of_run(folder)
    share_cores(options.device)

    with importing():
        from qlora_lowmem.run.merge import merge_run

    profile = merge_run(recipe, folder, to, options.dtype, options.device, quiet=options.quiet)
    print(f"merged model in {to}: {options.dtype}, for transformers' from_pretrained({str(to)!r})", file=sys.stderr)
    if profile is not None:
        print(phase_table(profile), file=sys.stderr)
    peaks = profile.to_dict() if profile else {"device": "cpu", "provenance": "measured"}
    content = {"merged": str(to), "dtype": options.dtype, "recipe_hash": recipe_hash(recipe)} | peaks
    write_json(options.json, content | {"environment": provenance_record(peaks["device"], peaks["provenance"])})
    return EXIT_OK
