"""Samples held out of training, for an evaluation whose loss says something."""

import math

from datasets import Dataset

from qlora_lowmem.errors import UsageError


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """(what is trained on, what is evaluated on): `fraction` of the samples, rounded up, chosen by the seed.

    Nothing is copied: both read the same file through lists of indices beside it.

    Raises:
        UsageError: nothing would be left to train on.
    """
    if not fraction:
        return dataset, None
    held = math.ceil(fraction * len(dataset))
    if held >= len(dataset):
        raise UsageError(
            f"data.eval_fraction: {fraction:g} of {len(dataset)} samples leaves none to train on; hold out less"
        )
    parts = dataset.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


def with_held_out(samples: int, fraction: float) -> int:
    """How many samples there must be for `samples` to be left to train on."""
    if not fraction:
        return samples
    total = math.ceil(samples / (1 - fraction))
    while total - math.ceil(fraction * total) < samples:
        total += 1
    return total
