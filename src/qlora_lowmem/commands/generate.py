"""What training changed: the base model's words beside the adapter's, and the loss on samples held out.

    qlora-lowmem generate --run outputs/demo --prompt "Who are you?"
    qlora-lowmem generate --config bench/recipes/demo.yaml --prompt "Who are you?" \\
        --data bench/recipes/demo-held-out.jsonl --samples 12

The base is loaded once, in 4 bits as in training, and stays on the device; its adapter is switched off for "before"
and on for "after". Answers are greedy: the same words every time. The held-out loss is the mean over the tokens that
training would score, so the file should hold samples that were not trained on.
"""

import argparse
import dataclasses
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import Command, add_json_argument, write_json
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run_folder.resumption import RECIPE_FILE, recipe_of_run

if TYPE_CHECKING:
    from qlora_lowmem.run.before_after import Answer, HeldOutLoss

_NARROWEST = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--run", metavar="DIR", help="output folder of a run, or one of its checkpoints")
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"the run's recipe (default: DIR's {RECIPE_FILE}); without --run, the adapter is in its output_dir",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="what a user says; may be given several times"
    )
    parser.add_argument("--data", metavar="FILE", help="samples held out, in any format that training reads")
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="how many of them, from the first (default: 32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer in tokens (default: 64)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where it runs (default: where the recipe ran)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --run: run the model repository's own Python code; what the folder itself says of it does not count",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code: 0 done, 1 a failure of ours, 2 usage, 3 does not fit, 130 interrupted."""
    if not options.prompt and not options.data:
        raise UsageError("nothing to show: give --prompt TEXT, --data FILE or both")
    for flag, value in (("--samples", options.samples), ("--max-new-tokens", options.max_new_tokens)):
        if value < 1:
            raise UsageError(f"{flag}: {value} is too few; give 1 or more")
    recipe, folder = _recipe_of(options)
    recipe = _on_device(recipe, options)
    checked = None
    if options.data:
        checked = check_data(options.data, recipe.data.train_on, quiet=options.quiet)
    adapter = _adapter_of(folder)
    answers, loss = _compare(recipe, adapter, checked, options)
    if options.json != "-":
        _print(answers, loss, checked, recipe)
    write_json(options.json, _summary(recipe, adapter, answers, loss, checked))
    return EXIT_OK


def _recipe_of(options: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe, and the folder that its adapter is in."""
    if options.run is None and options.config is None:
        raise UsageError("whose words? Give the output folder of a run (--run), its recipe (--config) or both")
    if options.config:
        recipe = load_recipe(options.config)
        return recipe, Path(options.run or recipe.run.output_dir)
    folder = Path(options.run)
    recipe = recipe_of_run(folder)
    base = dataclasses.replace(recipe.base, trust_remote_code=options.trust_remote_code)
    return dataclasses.replace(recipe, base=base), folder


def _on_device(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe on the device that was asked for; what only training reads may contradict it."""
    device = options.device or recipe.run.device
    if device == "virtual" or virtual_gpu.current_card() is not None:
        raise UsageError("run.device: on a virtual GPU there are no values to show; give --device cpu or cuda")
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, device=device))


def _adapter_of(folder: Path) -> Path:
    """The folder itself, or the newest whole checkpoint in it while training has not ended."""
    from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS, check_adapter
    from qlora_lowmem.run_folder.checkpoints import newest_whole

    if not (folder / ADAPTER_WEIGHTS).is_file():
        checkpoint = newest_whole(folder).checkpoint
        if checkpoint is not None:
            _say(f"training has not ended; the adapter is that of {checkpoint}")
            folder = checkpoint
    check_adapter(folder)
    return folder


def _compare(
    recipe: Recipe, adapter: Path, checked: CheckedData | None, options: argparse.Namespace
) -> "tuple[list[Answer], HeldOutLoss | None]":
    from qlora_lowmem.run.before_after import answer, held_out_loss, load_adapted
    from qlora_lowmem.training.progress import quiet_libraries

    quiet_libraries(bars=not options.quiet)
    adapted = load_adapted(recipe, adapter)
    answers = answer(adapted, options.prompt, options.max_new_tokens, quiet=options.quiet)
    loss = held_out_loss(adapted, recipe, checked, options.samples) if checked is not None else None
    return answers, loss


def _print(answers: "list[Answer]", loss: "HeldOutLoss | None", checked: CheckedData | None, recipe: Recipe) -> None:
    if answers:
        width = max(_NARROWEST, (shutil.get_terminal_size((120, 24)).columns - 10) // 3)
        rows = [[each.prompt, each.before, each.after] for each in answers]
        headers = ["prompt", "before (base model)", "after (with the adapter)"]
        print(tabulate(rows, headers=headers, tablefmt="simple_grid", maxcolwidths=width, disable_numparse=True))
    if loss is None or checked is None:
        return
    figures = loss.to_dict()
    rows = [
        [name, f"{figures[name]['loss']:.4f}", f"{figures[name]['perplexity']:.2f}"] for name in ("before", "after")
    ]
    print(tabulate(rows, headers=["", "loss", "perplexity"], tablefmt="simple", disable_numparse=True))
    print(f"mean over {loss.scored_tokens:,} scored tokens of {loss.samples} samples of {checked.report.name}")
    if Path(checked.source.name).resolve() == Path(recipe.data.data).resolve():
        print("note: that is the file the adapter was trained on; a file held out says more")


def _summary(
    recipe: Recipe,
    adapter: Path,
    answers: "list[Answer]",
    loss: "HeldOutLoss | None",
    checked: CheckedData | None,
) -> dict[str, Any]:
    from qlora_lowmem.run.execute import device_name

    device = "cpu" if recipe.run.device == "cpu" else device_name()
    content: dict[str, Any] = {"model": recipe.base.model, "adapter": str(adapter), "recipe_hash": recipe_hash(recipe)}
    content |= {"device": device, "provenance": "measured", "environment": provenance_record(device, "measured")}
    content["answers"] = [asdict(each) for each in answers]
    if loss is not None and checked is not None:
        content["held_out"] = {"data": checked.report.name, **loss.to_dict()}
    return content


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COMMAND = Command("generate", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
