"""The peak of one case, measured as its benchmark does."""

from typing import Any

import torch

from published import cases_loss, cases_module  # noqa: F401  # they register themselves
from published.cases import CASES, Setting


def steady_peak(name: str, x: int, mode: str, config: dict[str, Any]) -> int:
    """`torch.cuda.max_memory_allocated()` of the third iteration, in bytes. A process may measure only one case."""
    step = CASES[name](Setting(x, mode, config))
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()
