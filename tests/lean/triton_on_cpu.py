"""Run by test_scan_triton.py with TRITON_INTERPRET=1: the kernels' results on CPU tensors, as numbers of error.

Triton's interpreter runs kernels in NumPy, with two gaps. A loop's index is Python's integer, without the methods that
compiled code gives it: `chunk_h` gets a `range` that yields tensors. And bf16 is held as its bits, which NumPy
multiplies as integers: 16-bit products are tried in fp16.
"""

import builtins
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from fla.ops.common import chunk_h
from torch import Tensor

from qlora_lowmem.lean import scan, scan_triton
from qlora_lowmem.lean.scan_chunks import ScanInputs, ScanOptions

LIMITS = (0.01, 2.0)
NAMES = ("y", "last state", "x", "dt", "B", "C", "first state")


def tensor_range(*bounds: Any) -> Iterator[Any]:
    return (tl.full((), index, tl.int32) for index in builtins.range(*map(int, bounds)))


def inputs(batch: int, seq: int, heads: int, dim: int, groups: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, seq, heads, dim),
        "dt": (batch, seq, heads),
        "b": (batch, seq, groups, width),
        "c": (batch, seq, groups, width),
        "state": (batch, heads, dim, width),
        "d": (heads,),
        "dt_bias": (heads,),
    }
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def with_gradients(function: Callable[..., Any], tensors: dict[str, Tensor], a: Tensor) -> list[Tensor]:
    leaves = [tensors[name].clone().requires_grad_() for name in ("x", "dt", "b", "c", "state")]
    x, dt, b, c, state = leaves
    ends = function(ScanInputs(x, dt, a, b, c, tensors["d"], tensors["dt_bias"], state), ScanOptions(16, LIMITS))
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g) for t in ends]
    return [*ends, *torch.autograd.grad(ends, leaves, weights)]


def errors(found: list[Tensor], true: list[Tensor]) -> dict[str, float]:
    pairs = zip(NAMES, found, true, strict=True)
    return {name: ((ours - theirs).norm() / theirs.norm()).item() for name, ours, theirs in pairs}


def main() -> None:
    chunk_h.range = tensor_range
    scan_triton.SPAN = 64
    report: dict[str, Any] = {}
    # Two groups; a span that is full, one that is not; decays as deep as the 48th head's.
    for name, shape, deepest in (("groups", (1, 70, 4, 16, 2, 16), 4.0), ("deep", (2, 70, 2, 16, 1, 16), 48.0)):
        tensors, a = inputs(*shape), -torch.linspace(1, deepest, shape[2])
        plain = with_gradients(scan.mamba2_scan, tensors, a)
        found = with_gradients(scan_triton.mamba2_scan, tensors, a)
        report[name] = errors(found, plain)
    advanced = scan_triton.advance_state(ScanInputs(a=a, **tensors), ScanOptions(16, LIMITS))
    report["advanced equals the last state"] = torch.equal(advanced, found[1])

    def in_fp16(function: Callable[..., Any]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.float16):
            return with_gradients(function, tensors, a)

    report["16 bits"] = {"plain": errors(in_fp16(scan.mamba2_scan), plain)}
    report["16 bits"]["triton"] = errors(in_fp16(scan_triton.mamba2_scan), plain)
    offered = [len(kernel.configs) for kernel in scan_triton._kernels()]
    report["configurations offered again"] = min(offered) > 1
    print(json.dumps(report))


if __name__ == "__main__":
    main()
