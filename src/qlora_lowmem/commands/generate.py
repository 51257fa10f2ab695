"""What training changed: the base model's words beside the adapter's, and the loss on samples held out.

    qlora-lowmem generate --run outputs/demo --prompt "Who are you?"
    qlora-lowmem generate --config bench/recipes/demo.yaml --prompt "Who are you?" \\
        --data bench/recipes/demo-held-out.jsonl --samples 12

The base is loaded once, in 4 bits as in training, and stays on the device; its adapter is switched off for "before"
and on for "after". Answers are greedy: the same words every time. The held-out loss is the mean over the tokens that
training would score, so the file should hold samples that were not trained on.
"""

import argparse
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import add_json_argument, whole_number, write_json
from qlora_lowmem.data import check_data
from qlora_lowmem.environment import provenance_record, share_cores
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run_folder.ownership import RECIPE_FILE, recipe_of_run
from qlora_lowmem.signals import importing

_NARROWEST = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", metavar="DIR", help="output folder of a run, or one of its checkpoints")
    config = f"the run's recipe (default: DIR's {RECIPE_FILE}); without --run, the adapter is in its output_dir"
    add("--config", metavar="RECIPE", help=config)
    said = "what a user says; may be given several times"
    add("--prompt", action="append", default=[], metavar="TEXT", help=said)
    add("--data", metavar="FILE", help="samples held out, in any format that training reads")
    add(
        "--samples",
        type=whole_number(1, 2**40),
        default=32,
        metavar="N",
        help="how many of them, from the first (default: 32)",
    )
    add(
        "--max-new-tokens", type=whole_number(1), default=64, metavar="N", help="longest answer in tokens (default: 64)"
    )
    add("--device", choices=("cpu", "cuda"), help="where it runs (default: where the recipe ran)")
    code = "with --run: run the model repository's own Python code; what the folder itself says of it does not count"
    add("--trust-remote-code", action="store_true", help=code)
    add("--quiet", action="store_true", help="no progress bars")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    if not options.prompt and not options.data:
        raise UsageError("nothing to show: give --prompt TEXT, --data FILE or both")
    recipe, folder = _recipe_of(options)
    share_cores(recipe.run.device)
    checked = check_data(options.data, recipe.data.train_on, quiet=options.quiet) if options.data else None
    adapter = _adapter_of(folder)

    with importing():
        from qlora_lowmem.memory.device import device_name
        from qlora_lowmem.run.before_after import answer, held_out_loss, load_adapted
        from qlora_lowmem.training.progress import quiet_libraries

    quiet_libraries(bars=not options.quiet)
    adapted = load_adapted(recipe, adapter)
    answers = answer(adapted, options.prompt, options.max_new_tokens, recipe.data.template, quiet=options.quiet)
    loss = held_out_loss(adapted, recipe, checked, options.samples) if checked is not None else None
    device = "cpu" if recipe.run.device == "cpu" else device_name()
    content: dict[str, Any] = {"model": recipe.base.model, "adapter": str(adapter), "recipe_hash": recipe_hash(recipe)}
    content |= {"device": device, "provenance": "measured", "environment": provenance_record(device, "measured")}
    content["answers"] = [asdict(each) for each in answers]
    if checked is not None and loss is not None:
        content["held_out"] = {"data": checked.report.name, **loss.to_dict()}
    if options.json != "-":
        _print(content)
        if checked is not None and Path(checked.source.name).resolve() == Path(recipe.data.data).resolve():
            print("note: that is the file the adapter was trained on; a file held out says more")
    write_json(options.json, content)
    return EXIT_OK


def _recipe_of(options: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe on the device asked for, and the adapter's folder; what only training reads may contradict itself."""
    if options.run is None and options.config is None:
        raise UsageError("whose words? Give the output folder of a run (--run), its recipe (--config) or both")
    if options.config:
        recipe = load_recipe(options.config)
        base = recipe.base
    else:
        recipe = recipe_of_run(Path(options.run))
        base = replace(recipe.base, trust_remote_code=options.trust_remote_code)
    device = options.device or recipe.run.device
    if device == "virtual" or virtual_gpu.current_card() is not None:
        raise UsageError("run.device: on a virtual GPU there are no values to show; give --device cpu or cuda")
    folder = Path(options.run or recipe.run.output_dir)
    return replace(recipe, base=base, run=replace(recipe.run, device=device)), folder


def _adapter_of(folder: Path) -> Path:
    """The folder itself, or the newest complete checkpoint in it while training has not ended."""
    from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS, check_adapter
    from qlora_lowmem.run_folder.checkpoints import newest_complete

    checkpoint = None if (folder / ADAPTER_WEIGHTS).is_file() else newest_complete(folder).checkpoint
    if checkpoint is not None:
        print(f"training has not ended; the adapter is that of {checkpoint}", file=sys.stderr, flush=True)
    check_adapter(checkpoint or folder)
    return checkpoint or folder


def _print(content: dict[str, Any]) -> None:
    if content["answers"]:
        width = max(_NARROWEST, (shutil.get_terminal_size((120, 24)).columns - 10) // 3)
        rows = [list(each.values()) for each in content["answers"]]
        headers = ["prompt", "before (base model)", "after (with the adapter)"]
        print(tabulate(rows, headers=headers, tablefmt="simple_grid", maxcolwidths=width, disable_numparse=True))
    if loss := content.get("held_out"):
        means = ((name, loss[name]["loss"], loss[name]["perplexity"]) for name in ("before", "after"))
        rows = [[name, f"{mean:.4f}", f"{perplexity:.2f}"] for name, mean, perplexity in means]
        print(tabulate(rows, headers=["", "loss", "perplexity"], tablefmt="simple", disable_numparse=True))
        print(f"mean over {loss['scored_tokens']:,} scored tokens of {loss['samples']} samples of {loss['data']}")
