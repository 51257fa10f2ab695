"""Samples as the trainer takes them: token ids and labels, on disk."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from qlora_lowmem.data import CheckedData, FaultLog, FaultySampleError
from qlora_lowmem.environment import processes
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import writing
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.contradictions import warm_up_beyond
from qlora_lowmem.tokens.encoding import NO_LOSS, Encoded, Encoder
from qlora_lowmem.tokens.store import TokenReport, TokenTally, are_whole, open_tokens, write_tokens
from qlora_lowmem.tokens.templates import check_templates, choose_marking, end_tokens

TOKENS_FOLDER, EVALUATION_FOLDER = "tokenised", "tokenised-evaluation"
_LOCK = ".lock"
_OURS = re.compile(r"[0-9a-f]{16}|\.[0-9a-f]{16}\.[0-9]+")  # whole; being written by the process of that number


@dataclass(frozen=True)
class TrainingData:
    """A dataset of `input_ids` and `labels` (and `seq_lengths` where samples are packed).

    Attributes:
        evaluated_on: a dataset like it; None where nothing is evaluated.
        report: what tokenising came to; None for synthetic samples.
        notes: what a person should know though it stops nothing.
        folder: where the tokens lie; None for synthetic samples.
        evaluation: what is evaluated on, where that is data of its own.
    """

    dataset: Dataset
    evaluated_on: Dataset | None = None
    report: TokenReport | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    evaluation: "TrainingData | None" = None
    _scratch: Any = field(default=None, repr=False)  # a temporary folder lives as long as what is read from it

    def discard(self) -> None:
        """Remove the tokens from disk: the run is complete and nobody resumes it."""
        if self.evaluation is not None:
            self.evaluation.discard()
        if self.folder is not None:
            _remove_ours(self.folder.parent)
            with contextlib.suppress(OSError):  # holds what is not ours
                if [path.name for path in self.folder.parent.iterdir()] == [_LOCK]:
                    (self.folder.parent / _LOCK).unlink()
                self.folder.parent.rmdir()


def synthetic_data(recipe: Recipe, vocabulary: int) -> TrainingData:
    """As many samples as the run sees, each of exactly `max_seq_length` random tokens, all scored: the worst case."""
    generator = torch.Generator().manual_seed(recipe.schedule.seed)
    size = (_seen_in(recipe, recipe.schedule.max_steps or 2), recipe.batch.max_seq_length)
    tokens = torch.randint(vocabulary, size, generator=generator).tolist()
    return TrainingData(_packed(recipe, Dataset.from_dict({"input_ids": tokens, "labels": tokens})))


def training_data(
    recipe: Recipe,
    checked: CheckedData,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path | None,
    *,
    evaluation: bool = False,
) -> TrainingData:
    """Tokenise checked samples into `output_dir`, or take what an interrupted run of the same data left there.

    A run of few steps tokenises only as many samples as it sees, chosen evenly over the data by the recipe's seed.

    Args:
        output_dir: the run's folder; None for a temporary one.
        evaluation: they are evaluated on, all of them.

    Raises:
        UsageError: data that do not go with the chat template, of which nothing is left to learn, or over which the
            run is shorter than its warm-up.
    """
    work = _Tokenising(recipe, checked, tokenizer, evaluation=evaluation)
    place = Path(output_dir or tempfile.gettempdir())
    with writing("the tokenised data", place):
        scratch = None if output_dir else tempfile.TemporaryDirectory(prefix="qlora_lowmem-")
        parent = Path(scratch.name) if scratch else place / (EVALUATION_FOLDER if evaluation else TOKENS_FOLDER)
        folder = parent / work.key()
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / _LOCK):  # of several processes, one writes
            if not are_whole(folder):
                _remove_ours(parent)  # of other data, damaged, or half written by a run that was killed
                write_tokens(folder, work.seen(), work.tally(), checked.report.samples)
    dataset, report = open_tokens(folder)
    _check_not_empty(recipe, report)
    dataset = _packed(recipe, dataset)
    if not evaluation:
        _check_warm_up(recipe, len(dataset))
    return TrainingData(dataset, None, report, work.notes, folder, _scratch=scratch)


def _remove_ours(parent: Path) -> None:
    """Remove the tokens in a folder, whole or half written (`store.py`), and nothing else."""
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.is_dir() and _OURS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def count_tokens(
    recipe: Recipe, checked: CheckedData, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool = False
) -> tuple[TokenReport, tuple[str, ...]]:
    """The report and the notes of `training_data`, and its errors, with nothing written."""
    work = _Tokenising(recipe, checked, tokenizer, evaluation=evaluation)
    tally = work.tally()
    for _ in tally.cut(work.seen()):
        pass
    report = tally.report(checked.report.samples)
    _check_not_empty(recipe, report)
    if not evaluation and not recipe.batch.packing:  # how many packs there will be is known once they are made
        _check_warm_up(recipe, report.samples)
    return report, work.notes


def encoded_samples(
    recipe: Recipe, checked: CheckedData, tokenizer: PreTrainedTokenizerBase, samples: int
) -> Iterator[tuple[int, Encoded]]:
    """The first `samples` samples with their line or row, tokenised as in training and not cut.

    Raises:
        UsageError: data that do not go with the chat template.
    """
    yield from _Tokenising(recipe, checked, tokenizer).encoded(itertools.islice(checked.samples(), samples), samples)


def show_sample(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int = 120) -> str:
    """The first sample as the model sees it; tokens with a loss are between `[[` and `]]`."""
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    shown = ""
    pairs = zip(ids[:limit], labels[:limit], strict=True)
    for scored, run in itertools.groupby(pairs, lambda pair: pair[1] != NO_LOSS):
        text = str(tokenizer.decode([token for token, _ in run]))
        shown += f"[[{text}]]" if scored else text
    return shown if len(ids) <= limit else f"{shown} ... ({len(ids)} tokens)"


_IN_TURNS = (
    "each pair is a turn of the user and one of the assistant, as the model's chat template puts them (TRL joins two "
    "texts as they are: data.template none)"
)
_UNSEEN = "messages bring {key!r}, which the chat template of {model!r} does not show, so it is not learned"


class _Tokenising:
    """The checked samples of a recipe on their way to tokens; `notes` are as in `TrainingData`."""

    def __init__(
        self, recipe: Recipe, checked: CheckedData, tokenizer: PreTrainedTokenizerBase, *, evaluation: bool = False
    ) -> None:
        model, report = recipe.base.model, checked.report
        check_templates(tokenizer, model)
        marking = choose_marking(tokenizer, report, recipe.data.train_on, model, recipe.data.template)
        self._recipe, self._checked, self._tokenizer = recipe, checked, tokenizer
        self._encoder = Encoder(tokenizer, marking)
        # How many samples the run can see: all where they are packed, counted in epochs or evaluated on.
        self._wanted = report.samples
        if recipe.schedule.max_steps is not None and not recipe.batch.packing and not evaluation:
            self._wanted = min(report.samples, _seen_in(recipe, recipe.schedule.max_steps))
        shown = str(tokenizer.chat_template)
        unseen = (_UNSEEN.format(key=key, model=model) for key in report.reasoning_keys if key not in shown)
        self.notes = (*([_IN_TURNS] if marking.turns else []), *unseen)

    def tally(self) -> TokenTally:
        source, revision = source_of(self._recipe), self._recipe.base.revision
        ends = end_tokens(self._tokenizer, source.generation_config(revision), source.text_config)
        return TokenTally(self._recipe.batch.max_seq_length, ends)

    def seen(self) -> Iterator[tuple[int, Encoded]]:
        """The samples that the run sees, tokenised, with their line or row."""
        samples, wanted = self._checked.samples(), self._wanted
        chosen = _chosen(samples, wanted, self._checked.report.samples, self._recipe.schedule.seed)
        return self.encoded(chosen, wanted)

    def encoded(self, samples: Iterable[tuple[int, dict[str, Any]]], count: int) -> Iterator[tuple[int, Encoded]]:
        report, quiet = self._checked.report, self._checked.quiet
        faults = FaultLog(report.name, report.unit)
        seen = 0
        for number, sample in tqdm(samples, total=count, desc="tokenising", unit="sample", delay=2, disable=quiet):
            seen += 1
            try:
                yield number, self._encoder.encode(sample)
            except FaultySampleError as fault:
                faults.add(number, fault)
        faults.refuse_if_any(seen)

    def key(self) -> str:
        """Equal for equal tokens: the source as it is now, the tokenizer, the fields that choose and cut samples."""
        recipe, checked, tokenizer = self._recipe, self._checked, self._tokenizer
        source = checked.source
        stat = Path(source.name).stat() if source.kind != "hub" else None
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        facts = {
            "source": [source.name, source.split, *([stat.st_size, stat.st_mtime_ns] if stat else [])],
            "samples": [checked.report.samples, self._wanted, recipe.schedule.seed],
            "fields": [checked.train_on, recipe.data.template, recipe.batch.max_seq_length],
            "tokenizer": [type(tokenizer).__name__, backend, str(tokenizer.chat_template), str(tokenizer.eos_token)],
            "versions": [importlib.metadata.version(name) for name in ("transformers", "trl", "tokenizers")],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(
    samples: Iterator[tuple[int, dict[str, Any]]], wanted: int, of_samples: int, seed: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`wanted` of `of_samples`, each as likely as any other: selection sampling (Knuth, vol. 2, 3.4.2, algorithm S)."""
    chance = random.Random(seed)
    left = wanted
    for passed, sample in enumerate(samples):
        if left == 0:
            return
        if chance.random() * (of_samples - passed) < left:
            left -= 1
            yield sample


def _check_not_empty(recipe: Recipe, report: TokenReport) -> None:
    if not report.samples:
        raise UsageError(
            f"batch.max_seq_length: at {recipe.batch.max_seq_length} tokens nothing is left to learn of "
            f"{report.dropped_samples} samples, of which the longest has {report.longest} tokens. Raise it, or shorten "
            "the prompts"
        )


def _check_warm_up(recipe: Recipe, samples: int) -> None:
    steps = steps_over(recipe, samples)
    reason = warm_up_beyond(recipe.optimizer.warmup_steps, steps)
    if reason is not None:
        raise UsageError(
            f"optimizer.warmup_steps: {recipe.optimizer.warmup_steps}, and {samples} samples in "
            f"{recipe.schedule.num_epochs:g} epochs are {steps} optimizer steps: {reason}, or raise schedule.num_epochs"
        )


def steps_over(recipe: Recipe, samples: int) -> int:
    """Optimizer steps of the run over all samples or packs, those held out among them.

    As transformers' `Trainer.set_initial_training_values` counts them.
    """
    if recipe.schedule.max_steps is not None:
        return recipe.schedule.max_steps
    trained_on = samples - math.ceil(recipe.data.eval_fraction * samples)
    batches = math.ceil(math.ceil(trained_on / recipe.batch.batch_size) / processes())
    in_an_epoch = math.ceil(batches / recipe.batch.gradient_accumulation_steps)
    return math.ceil(recipe.schedule.num_epochs * max(in_an_epoch, 1))


def _packed(recipe: Recipe, dataset: Dataset) -> Dataset:
    """Samples joined until `max_seq_length` is full, best fit first, none of them split."""
    if not recipe.batch.packing:
        return dataset
    folder = folder_of(dataset)
    with writing("the packed samples", folder):
        return pack_dataset(dataset, recipe.batch.max_seq_length, "bfd")


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """(what is trained on, what is evaluated on): `fraction` of the samples, rounded up, chosen by the seed.

    Nothing is copied: both read the same file through lists of indices beside it.

    Raises:
        UsageError: nothing would be left to train on, or the lists cannot be written.
    """
    if not fraction:
        return dataset, None
    held = math.ceil(fraction * len(dataset))
    if held >= len(dataset):
        raise UsageError(
            f"data.eval_fraction: {fraction:g} of {len(dataset)} samples leaves none to train on; hold out less"
        )
    folder = folder_of(dataset)
    with writing("the list of samples held out", folder):
        parts = dataset.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


def folder_of(dataset: Dataset) -> Path:
    """Where a data set's file lies, beside which lists and packed copies of it are written; of one in memory, `.`."""
    return next((Path(file["filename"]).parent for file in dataset.cache_files), Path())


def _seen_in(recipe: Recipe, steps: int) -> int:
    """How many samples there must be for those of `steps` to be left to train on, some held out."""
    batch, fraction = recipe.batch, recipe.data.eval_fraction
    samples = steps * batch.batch_size * batch.gradient_accumulation_steps * processes()
    if not fraction:
        return samples
    total = math.ceil(samples / (1 - fraction))
    while total - math.ceil(fraction * total) < samples:
        total += 1
    return total
