"""Fine-tune with QLoRA in as little GPU memory as the recipe allows, or learn why it does not fit.

    python -m qlora_lowmem.train --config bench/recipes/optimised.yaml --data my.jsonl --weights pretrained
    python -m qlora_lowmem.train --config bench/recipes/optimised.yaml --device virtual --card rtx-4050-laptop-6gb

Every field of the recipe is a flag. Training stays on the GPU and fails rather than spill into system memory.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.command import add_json_argument, run_command, write_json
from qlora_lowmem.data import Samples, read_samples
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.overrides import RecipeArgumentParser, add_override_arguments, overrides_from
from qlora_lowmem.recipe import SYNTHETIC, Recipe, recipe_hash
from qlora_lowmem.recipe_io import load_recipe
from qlora_lowmem.units import format_bytes
from qlora_lowmem.virtual_runs import recipe_card

if TYPE_CHECKING:
    from qlora_lowmem.execute import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 1 a failure of ours, 2 usage, 3 does not fit, 130 interrupted."""
    return run_command(_run, list(sys.argv[1:] if arguments is None else arguments))


def parser() -> argparse.ArgumentParser:
    """The command line: the command's own flags, then one for each field of the recipe."""
    parser = RecipeArgumentParser(
        prog="python -m qlora_lowmem.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file (bench/recipes/)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what would be trained; train nothing"
    )
    add_json_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no sample")
    parser.add_argument(
        "--no-advice", action="store_true", help="on running out of memory, do not try which knobs would help"
    )
    add_override_arguments(parser)
    return parser


def _run(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    recipe = load_recipe(options.config, overrides_from(options))
    checked = _read_data(recipe)
    resolve_model(recipe.base.model, recipe.base.weights)
    card = recipe_card(recipe) if recipe.run.device == "virtual" else None
    if options.dry_run:
        return _dry_run(recipe, checked, options)
    if recipe.run.device == "virtual" and virtual_gpu.current_card() is None:
        assert card is not None
        return _on_virtual_card(recipe, card, arguments, options)
    return _train(recipe, checked, options)


def _read_data(recipe: Recipe) -> Samples | None:
    """The checked data, or None for synthetic samples."""
    return None if recipe.data.data == SYNTHETIC else read_samples(recipe.data.data, recipe.data.train_on)


def _data_line(checked: Samples | None) -> str:
    if checked is None:
        return "synthetic, every sample at full length"
    return f"{checked.report.count} samples of {checked.report.format} in {checked.report.path}"


def _dry_run(recipe: Recipe, checked: Samples | None, options: argparse.Namespace) -> int:
    from qlora_lowmem.execute import check_model

    modules, parameters = check_model(recipe)
    if options.json != "-":
        print(recipe.to_yaml())
        print(f"# would train {parameters:,} parameters in adapters of {modules} modules")
        print(f"# data: {_data_line(checked)}")
    summary = {"recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe), "dry_run": True}
    summary |= {"adapted_modules": modules, "trainable_parameters": parameters}
    write_json(options.json, summary)
    return EXIT_OK


def _train(recipe: Recipe, checked: Samples | None, options: argparse.Namespace) -> int:
    """Train in this process, on the GPU that CUDA shows (real or virtual) or on the CPU."""
    from qlora_lowmem.checkpoints import checkpoint_to_resume
    from qlora_lowmem.execute import OutOfGpuMemoryError, execute
    from qlora_lowmem.model_card import write_model_card
    from qlora_lowmem.progress import ProgressLine, quiet_libraries

    quiet_libraries()

    virtual = virtual_gpu.current_card() is not None
    resume_from = None if virtual else checkpoint_to_resume(recipe)
    if resume_from is not None:
        _say(f"resuming from {resume_from}")
    line = ProgressLine(real_values=not virtual, quiet=options.quiet)

    def ready(job: Any, recorder: Any) -> None:
        line.watch(recorder)
        if not options.quiet:
            _describe(job, checked)

    try:
        outcome = execute(
            recipe,
            checked,
            output_dir=Path(recipe.run.output_dir),
            resume_from=resume_from,
            callbacks=[line],
            on_ready=ready,
            save=not virtual,
        )
    except OutOfGpuMemoryError as error:
        failure = {"phase": error.phase, "message": error.torch_message}
        content = _summary(recipe, None) | error.profile.to_dict() | {"fits": False, "failure": failure}
        return _does_not_fit(recipe, content, options)
    summary = _summary(recipe, outcome)
    if not virtual:
        write_model_card(Path(recipe.run.output_dir), recipe, outcome, str(summary["device"]))
        summary["adapter"] = recipe.run.output_dir
    _report(outcome, summary)
    write_json(options.json, summary)
    return EXIT_OK


def _on_virtual_card(recipe: Recipe, card: virtual_gpu.Card, arguments: list[str], options: argparse.Namespace) -> int:
    """Start this command again as a process on the virtual card, and add the advice that needs more such runs."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "qlora_lowmem.train", *arguments, "--no-advice", "--json", str(result)]
        # That values are not real is said by the summary, which has no loss.
        env = os.environ | {"QLORA_LOWMEM_QUIET": "1"}
        report = virtual_gpu.run(command, card, env=env, stdout=sys.stderr if options.json == "-" else None)
        content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    if content is None:
        return report.exit_code
    if report.exit_code == EXIT_DOES_NOT_FIT:
        return _does_not_fit(recipe, content, options)
    write_json(options.json, content)
    return report.exit_code


def _does_not_fit(recipe: Recipe, content: dict[str, Any], options: argparse.Namespace) -> int:
    """Say what was needed, what there was and which knobs would help most."""
    if options.no_advice:
        write_json(options.json, content)
        return EXIT_DOES_NOT_FIT
    from qlora_lowmem.advice import advise, card_like

    failure = content["failure"]
    _say(f"does not fit: {content['device']} ran out of memory in phase {failure['phase']!r} ({content['provenance']})")
    _say(f"torch says: {failure['message']}")
    card = card_like(content["device"], content["total_bytes"])
    if card is None:
        _say(f"no virtual card is known for {content['device']}; shorter sequences and checkpointing save most")
    else:
        try:
            advice = advise(recipe, card, note=_say)
            content["advice"] = advice.to_dict()
            for text in advice.lines():
                _say(text)
        except virtual_gpu.VirtualGPUError as error:
            _say(f"which knobs would help most cannot be tried here: {error}")
    write_json(options.json, content)
    return EXIT_DOES_NOT_FIT


def _summary(recipe: Recipe, outcome: "Outcome | None") -> dict[str, Any]:
    profile = outcome.profile if outcome else None
    if profile is None:
        peaks: dict[str, Any] = dict.fromkeys(
            ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes"), 0
        ) | {"device": "cpu", "provenance": "measured"}
    else:
        peaks = profile.to_dict()
    content = peaks | {"fits": True, "recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe)}
    content["environment"] = provenance_record(peaks["device"], peaks["provenance"])
    if outcome is not None:
        content["trainable_parameters"] = outcome.trainable_parameters
        content["adapted_modules"] = outcome.adapted_modules
        content["steps"] = outcome.steps
        content["floor_bytes"] = outcome.floor.total
        # A virtual GPU computes nothing: a loss of it would be a made-up figure.
        if peaks["provenance"] == "measured" and outcome.losses:
            content["losses"] = list(outcome.losses)
            content |= {"first_loss": outcome.losses[0], "final_loss": outcome.losses[-1]}
            content |= {"tokens": outcome.tokens, "tokens_per_second": round(outcome.tokens / outcome.seconds, 1)}
    return content


def _describe(job: Any, checked: Samples | None) -> None:
    from qlora_lowmem.dataset import show_sample

    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    _say(f"training {trained:,} parameters in adapters of {len(job.targets.modules)} modules")
    if checked is not None:
        _say(f"data: {_data_line(checked)}")
        for note in checked.report.notes:
            _say(f"note: {note}")
        _say("the first sample as the model sees it, the loss on what is between [[ and ]]:")
        _say(show_sample(job.trainer.train_dataset, job.trainer.processing_class))


def _report(outcome: "Outcome", summary: dict[str, Any]) -> None:
    from qlora_lowmem.report.tables import phase_table

    if outcome.profile is not None:
        _say(phase_table(outcome.profile))
        over = outcome.profile.peak_allocated_bytes / outcome.floor.total
        _say(f"floor {format_bytes(outcome.floor.total)} (weights, adapters with their state, two residual tensors)")
        _say(f"allocated is {over:.2f} times the floor")
    if "final_loss" in summary:
        _say(f"loss {summary['first_loss']:.4f} -> {summary['final_loss']:.4f} in {outcome.steps} steps")
        _say(f"adapter saved to {summary['adapter']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
