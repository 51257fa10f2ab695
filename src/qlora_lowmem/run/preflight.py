"""Preflight: all of a recipe that can be refused before a byte of weights is read, looked at once and in one order.

First what needs no heavy library (`inputs_of`), then what does (`preflight`, `count_tokens_of`): a mistake is told in
milliseconds where it can be. What was found on the way is kept, and nothing of it is made again.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_lowmem import virtual_gpu
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.sources import ModelSource, source_of
from qlora_lowmem.recipe import SYNTHETIC, Recipe

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_lowmem.lean import LeanReport
    from qlora_lowmem.models.adapters import Adapted
    from qlora_lowmem.models.limits import Limits
    from qlora_lowmem.models.loading import Precision
    from qlora_lowmem.models.targets import Targets
    from qlora_lowmem.models.trained_base import TrainedBase
    from qlora_lowmem.tokens.dataset import TrainingData
    from qlora_lowmem.tokens.store import TokenReport

# Packages, by which the loggers are named too (transformers/integrations/integration_utils.py).
_LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Inputs:
    """A recipe, and what it names: found and sound.

    Attributes:
        source: where its model leads.
        samples: its data, each sample checked; None for synthetic ones.
        evaluation: the same of `eval_data`, where samples are evaluated on that are not of `samples`.
        card: the virtual card that it names; None on another device.
    """

    recipe: Recipe
    source: ModelSource
    samples: CheckedData | None = None
    evaluation: CheckedData | None = None
    card: virtual_gpu.Card | None = None

    @property
    def device_type(self) -> str:
        """`cpu`, or `cuda` for a real card and a virtual one."""
        return "cpu" if self.recipe.run.device == "cpu" else "cuda"


@dataclass(frozen=True)
class Preflight:
    """Inputs that go together, as far as can be known without weights.

    Attributes:
        precision: the formats that the job computes in; None where the card is not known yet.
        skeleton: the model on the meta device. For random weights it is what they are put into.
        trained_base: what of the base model is trained beside adapters.
        lean: which ideas of the section `lean` the model will take; None where they are not asked for.
        notes: what was chosen for the model, and a person may not expect.
    """

    inputs: Inputs
    precision: "Precision | None"
    skeleton: "PreTrainedModel"
    targets: "Targets"
    trained_base: "TrainedBase"
    lean: "LeanReport | None"
    tokenizer: "PreTrainedTokenizerBase"
    limits: "Limits"
    notes: tuple[str, ...]

    @functools.cached_property
    def adapted(self) -> "Adapted":
        """What will be trained, counted on the adapted model: on the meta device, before weights are read."""
        from qlora_lowmem.models.adapters import foresee_adapters

        return foresee_adapters(self.skeleton, self.lora_config, self.trained_base.weights)

    @property
    def lora_config(self) -> "LoraConfig":
        """All that PEFT is asked for."""
        from qlora_lowmem.models.adapters import lora_config

        targets = self.targets
        return lora_config(self.inputs.recipe, targets.names, targets.within, self.trained_base.rows)


def _notes(recipe: Recipe, model: "PreTrainedModel") -> Iterator[str]:
    """What was chosen for the model, and a person may not expect. Asked before random weights are put into it."""
    from qlora_lowmem.models.refusals import quantised_by
    from qlora_lowmem.models.targets import attends

    if recipe.base.attention == "auto" and attends(model) and not model._supports_sdpa:
        yield f"attention is eager: transformers has no sdpa for {type(model).__name__}"
    if recipe.base.weights == "pretrained" and quantised_by(model.config) is not None:
        yield (
            f"the model is in 4 bits already ({quantised_by(model.config)}) and is trained as it is, whatever "
            "quantization says; merge adds the adapter to what its 4 bits stand for"
        )


def inputs_of(recipe: Recipe, *, quiet: bool = True) -> Inputs:
    """Look up what a recipe names. Reads all of its data; imports nothing heavy, but for data in tables.

    Raises:
        UsageError: data with faults, a model, a logger or a virtual card that is not there.
    """
    data = recipe.data
    samples = None if data.data == SYNTHETIC else check_data(data.data, data.train_on, quiet=quiet)
    evaluation = None
    if samples is not None and data.eval_data is not None:
        with _of_evaluation():
            evaluation = check_data(data.eval_data, data.train_on, quiet=quiet)
    source = source_of(recipe)
    check_logger(recipe.run.report_to)
    return Inputs(recipe, source, samples, evaluation, recipe_card(recipe) if recipe.run.device == "virtual" else None)


def preflight(inputs: Inputs, *, supports_bf16: bool | None = None, resume_from: Path | None = None) -> Preflight:
    """Look at the model without its weights, at the tokenizer, and at a checkpoint.

    Args:
        supports_bf16: whether the device computes in bf16; None where that is not known yet.

    Raises:
        UsageError: formats that the device or gradient release cannot take, packing that the model's layers cannot,
            target modules that it does not have, modules or tokens that cannot be trained, an option of the section
            `lean` that it cannot take, a checkpoint that could run code, a tokenizer that is not there, sequences
            longer than the model has positions.
    """
    from qlora_lowmem.lean import foresee_lean
    from qlora_lowmem.models.limits import Limits, with_padding
    from qlora_lowmem.models.loading import choose_precision, load_tokenizer, skeleton
    from qlora_lowmem.models.targets import lean_options, lean_refusals, targets_of, why_not_packed
    from qlora_lowmem.models.trained_base import trained_base
    from qlora_lowmem.models.trusted import check_checkpoint

    recipe, source = inputs.recipe, inputs.source
    precision = None
    if supports_bf16 is not None:
        precision = choose_precision(recipe, inputs.device_type, supports_bf16)
    model = skeleton(recipe, source, precision.compute if precision else None)
    reason = why_not_packed(model.config) if recipe.batch.packing else None
    if reason is not None:
        raise UsageError(f"batch.packing: true, and {recipe.base.model!r} cannot: {reason}. Set batch.packing to false")
    if recipe.memory.gradient_checkpointing and not recipe.lean.lean and not model.supports_gradient_checkpointing:
        raise UsageError(
            f"memory.gradient_checkpointing: true, and {recipe.base.model!r} cannot: transformers has none for "
            f"{type(model).__name__}. Set memory.gradient_checkpointing to false (--no-gradient-checkpointing)"
        )
    limits = Limits.of(model)
    limits.check_length(recipe.batch.max_seq_length, recipe.base.model)
    targets = targets_of(model, recipe.lora)
    with lean_refusals(recipe):
        lean = foresee_lean(model, lean_options(recipe), inputs.device_type) if recipe.lean.lean else None
    if resume_from is not None:
        check_checkpoint(resume_from)
    tokenizer = with_padding(load_tokenizer(recipe, source))
    trained = trained_base(model, recipe, tokenizer, targets)
    notes = (*targets.notes, *trained.notes, *_notes(recipe, model))
    return Preflight(inputs, precision, model, targets, trained, lean, tokenizer, limits, notes)


@contextmanager
def _of_evaluation() -> Iterator[None]:
    """What is said of data here is said of those that are evaluated on."""
    try:
        yield
    except UsageError as error:
        said = re.sub(r"\bdata\.data\b", "data.eval_data", str(error))
        raise UsageError(re.sub(r"(?<=\s)--data\b", "--eval-data", said)) from error


def count_tokens_of(checked: Preflight, samples: CheckedData) -> "tuple[TokenReport, tuple[str, ...]]":
    """What tokenising the data will come to, and what a person should know of it; nothing is written.

    Raises:
        UsageError: data that do not go with the model's chat template, or a warm-up longer than the run over them.
    """
    from qlora_lowmem.tokens.dataset import count_tokens

    tokens, notes = count_tokens(checked.inputs.recipe, samples, checked.tokenizer)
    _check_tokens(checked, tokens, samples)
    return tokens, notes


def count_evaluation_of(checked: Preflight, samples: CheckedData) -> "tuple[TokenReport, tuple[str, ...]]":
    """As `count_tokens_of`, of the samples that are evaluated on."""
    from qlora_lowmem.tokens.dataset import count_tokens

    with _of_evaluation():
        tokens, notes = count_tokens(checked.inputs.recipe, samples, checked.tokenizer, evaluation=True)
    _check_tokens(checked, tokens, samples)
    return tokens, notes


def _check_tokens(checked: Preflight, tokens: "TokenReport | None", samples: CheckedData) -> None:
    """Raises `UsageError` where a batch would hold a token that the model does not know."""
    assert tokens is not None
    batch, tokenizer, model = checked.inputs.recipe.batch, checked.tokenizer, checked.inputs.recipe.base.model
    checked.limits.check_token(tokens.largest_id, tokenizer, model, f"makes of {samples.report.name}")
    if batch.batch_size > 1 and not batch.packing:
        checked.limits.check_token(tokenizer.pad_token_id or 0, tokenizer, model, "pads batches with")


def tokenised(checked: Preflight, output_dir: Path | None) -> "TrainingData":
    """The samples as the trainer takes them; synthetic ones are made of the model's vocabulary.

    Args:
        output_dir: the run's folder; None for a temporary one.

    Raises:
        UsageError: as `count_tokens_of`, nothing would be left to train on, or they cannot be written.
    """
    from qlora_lowmem.tokens.dataset import hold_out, synthetic_data, training_data

    recipe, samples, evaluation = checked.inputs.recipe, checked.inputs.samples, checked.inputs.evaluation
    if samples is None:
        data = synthetic_data(recipe, int(checked.skeleton.config.get_text_config().vocab_size))
    else:
        data = training_data(recipe, samples, checked.tokenizer, output_dir)
        _check_tokens(checked, data.report, samples)
    if evaluation is not None:
        with _of_evaluation():
            looked_at = training_data(recipe, evaluation, checked.tokenizer, output_dir, evaluation=True)
        _check_tokens(checked, looked_at.report, evaluation)
        return replace(data, evaluated_on=looked_at.dataset, evaluation=looked_at)
    trained_on, evaluated_on = hold_out(data.dataset, recipe.data.eval_fraction, recipe.schedule.seed)
    return replace(data, dataset=trained_on, evaluated_on=evaluated_on)


def recipe_card(recipe: Recipe) -> virtual_gpu.Card:
    """The virtual card that `recipe` names; raises `UsageError` if no card of the table has that name."""
    try:
        return virtual_gpu.get_card(recipe.run.card)
    except virtual_gpu.UnknownCardError as error:
        raise UsageError(f"run.card: {error}") from None


def check_logger(report_to: str) -> None:
    """Raises `UsageError` for a logger whose package is missing."""
    if report_to in _LOGGERS and importlib.util.find_spec(report_to) is None:
        raise UsageError(
            f"run.report_to: {report_to!r} needs the package {report_to}, which is not installed. Run: python -m pip "
            f"install {report_to}; or set run.report_to to none: log.jsonl in the output folder is written in any case"
        )
