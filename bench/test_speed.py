"""Step time and tokens per second of every recipe that fits, on the real GPU: `pytest bench/test_speed.py --gpu`.

In this process, one recipe after the other, memory given back in between. Whether a recipe fits is found out by its
first step, which is not timed: it creates the optimizer's state and tunes kernels. Rehearsed on a virtual GPU, that
step is all: kernels that compute nothing take no time worth telling.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from matrix_recipes import ORDER
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.device import device_name, driver_version
from qlora_lowmem.memory.profile import provenance_here
from qlora_lowmem.recipe import Recipe
from speed_table import Speed, write_speed

if TYPE_CHECKING:
    from training_steps import TrainingSteps

pytestmark = pytest.mark.gpu

WARM_UP_STEPS = 2
TIMED_STEPS = 10


@pytest.fixture(scope="module")
def speeds(results_folder: Path) -> Iterator[list[Speed]]:
    """What was timed; the table is written at the end."""
    found: list[Speed] = []
    yield found
    if found:
        record = provenance_record(device_name(), "measured", driver_version())
        write_speed(results_folder / device_name(), found, record)


def _started(recipe: Recipe, folder: Path) -> "TrainingSteps | None":
    """The recipe's steps with the first one done; None where it does not fit."""
    from torch.cuda import OutOfMemoryError

    from training_steps import TrainingSteps

    try:
        training = TrainingSteps(recipe, folder)
        training.step()
    except OutOfMemoryError:
        return None
    return training


@pytest.mark.parametrize("name", ORDER)
def test_step_time(name: str, recipes: list[Recipe], benchmark: Any, speeds: list[Speed], tmp_path: Path) -> None:
    from training_steps import free_memory

    recipe = next(each for each in recipes if each.name == name)
    training = _started(recipe, tmp_path)
    if training is None:
        free_memory()  # here, where no traceback holds the failed step's tensors any more
        pytest.skip("it does not fit this GPU")
    try:
        if provenance_here() == "virtual":
            pytest.skip("its step runs; a virtual GPU has no step time")
        benchmark.pedantic(training.step, rounds=TIMED_STEPS, warmup_rounds=WARM_UP_STEPS)
        speed = Speed.of(recipe, training.tokens, benchmark.stats.stats.sorted_data)
    finally:
        training.close()
    benchmark.extra_info["tokens_per_second"] = speed.tokens_per_second
    speeds.append(speed)
    assert speed.tokens_per_second > 0
