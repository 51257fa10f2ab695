"""One operator of torch's own tests at a time, on its samples: on the CPU, then on the card of this process.

`torch.testing._internal.common_methods_invocations` has some 600 operators, each with valid small inputs. Samples are
made on the CPU, where values are real, and moved.
"""

import contextlib
import itertools
import sys
import types
import unittest
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

_SAMPLES = 24  # of an operator; some have hundreds, which differ in little


def load() -> None:
    """Import torch's table, which wants a package that its tests use and its samples do not."""
    if "expecttest" not in sys.modules:
        with contextlib.suppress(ImportError):
            import expecttest  # noqa: F401
    if "expecttest" not in sys.modules:
        sys.modules["expecttest"] = stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    with unittest.mock.patch("torch.cuda.is_available", return_value=False):  # else it initialises CUDA
        table()


def table() -> dict[str, Any]:
    """torch's operators by their names, with the variant where there are several: `linalg.qr`, `std.unbiased`."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in op_db}


def names() -> list[str]:
    """All of them."""
    return sorted(table())


def try_operator(name: str) -> dict[str, Any]:
    """Run it on its samples.

    Returns how many `samples` ran on the CPU, those that `failed` on the card as (what was said, which sample), and
    those whose outputs `differ` in size as (CPU's, card's).
    """
    op = table()[name]
    torch.manual_seed(0)
    result: dict[str, Any] = {"samples": 0, "failed": [], "differ": [], "dtype": ""}
    for sample in _samples(op, result):
        arguments = (sample.input, *sample.args)
        with torch.no_grad():
            try:
                on_cpu = op(*tree_map_only(torch.Tensor, torch.clone, arguments), **sample.kwargs)
            except Exception:  # torch's own CPU build cannot, for want of LAPACK or of the dtype
                continue
            result["samples"] += 1
            moved, options = tree_map_only(torch.Tensor, lambda t: t.cuda(), (arguments, sample.kwargs))
            options = {key: "cuda" if key == "device" else value for key, value in options.items()}
            try:
                on_card = op(*moved, **options)
                torch.cuda.synchronize()
            except Exception as error:
                result["failed"].append(f"{type(error).__name__}: {error}"[:400])
                continue
        sizes = [_sizes(each) for each in (on_cpu, on_card)]
        if sizes[0] != sizes[1]:
            result["differ"].append([str(each)[:200] for each in sizes])
    return result


def _samples(op: Any, result: dict[str, Any]) -> Iterator[Any]:
    supported = op.dtypes
    for dtype in (torch.float32, torch.int64, torch.complex64, torch.bool, torch.int32, *supported):
        if dtype in supported:
            break
    result["dtype"] = str(dtype).removeprefix("torch.")
    yield from itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), _SAMPLES)


def _sizes(output: Any) -> list[Any]:
    leaves, _ = tree_flatten(output)
    return [[list(leaf.shape), str(leaf.dtype)] for leaf in leaves if isinstance(leaf, torch.Tensor)]
