"""Step time and tokens per second of every recipe that fits, on the real GPU: `pytest bench/test_speed.py --gpu`.

In this process, one recipe after the other, memory given back in between. Whether a recipe fits is found out by its
first step, which is not timed: it creates the optimizer's state and tunes kernels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from matrix_recipes import ORDER
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.recipe import Recipe
from speed_table import Speed, write_speed

pytestmark = pytest.mark.gpu

WARM_UP_STEPS = 2
TIMED_STEPS = 10


@pytest.fixture(scope="module")
def speeds(results_folder: Path) -> Iterator[list[Speed]]:
    """What was timed; the table is written at the end."""
    found: list[Speed] = []
    yield found
    if found:
        import pynvml

        from qlora_lowmem.execute import device_name

        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        write_speed(results_folder / device_name(), found, provenance_record(device_name(), "measured", driver))


@pytest.mark.parametrize("name", ORDER)
def test_step_time(name: str, recipes: list[Recipe], benchmark: Any, speeds: list[Speed], tmp_path: Path) -> None:
    import torch

    from training_steps import TrainingSteps, free_memory

    recipe = next(each for each in recipes if each.name == name)
    training = None
    try:
        training = TrainingSteps(recipe, tmp_path)
        training.step()
    except torch.cuda.OutOfMemoryError:
        training = None
        free_memory()
        pytest.skip("it does not fit this GPU")
    try:
        benchmark.pedantic(training.step, rounds=TIMED_STEPS, warmup_rounds=WARM_UP_STEPS)
        speed = Speed.of(recipe, training.tokens, benchmark.stats.stats.sorted_data)
    finally:
        training.close()
    benchmark.extra_info["tokens_per_second"] = speed.tokens_per_second
    speeds.append(speed)
    assert speed.tokens_per_second > 0
