"""The computed order holds every index once, changes with seed and epoch, and looks like chance."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.training.state import ComputedOrder


@given(st.integers(0, 3000), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_index_comes_once(count: int, seed: int, epoch: int) -> None:
    order = ComputedOrder(count, seed)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(count))
    assert len(order) == count


def test_seed_and_epoch_decide_the_order() -> None:
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        order = ComputedOrder(1000, seed)
        order.set_epoch(epoch)
        assert list(order) == list(order)
        orders.append(tuple(order))
    assert len(set(orders)) == 4


@pytest.mark.parametrize("count", [2**16, 100_003])
def test_it_looks_like_chance(count: int) -> None:
    """Places are neither related to indices nor to their neighbours, and the first thousand cover the whole range."""
    order = np.array(list(ComputedOrder(count, 7)))
    limit = 4 / np.sqrt(count)
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < limit
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < limit
    tenths = np.histogram(order[:1000], bins=10, range=(0, count))[0]
    assert ((tenths - 100) ** 2 / 100).sum() < 27.9, "chi-squared of nine degrees of freedom, one in a thousand"
