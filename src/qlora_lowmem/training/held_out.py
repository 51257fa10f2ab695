"""Samples held out of training, for an evaluation whose loss says something."""

import math
from pathlib import Path

from datasets import Dataset

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import writing


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
    with writing("the list of samples held out", folder_of(dataset)):
        parts = dataset.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


def folder_of(dataset: Dataset) -> Path:
    """Where a data set's file lies, beside which lists and packed copies of it are written; of one in memory, `.`."""
    return next((Path(file["filename"]).parent for file in dataset.cache_files), Path())


def with_held_out(samples: int, fraction: float) -> int:
    """How many samples there must be for `samples` to be left to train on."""
    if not fraction:
        return samples
    total = math.ceil(samples / (1 - fraction))
    while total - math.ceil(fraction * total) < samples:
        total += 1
    return total
