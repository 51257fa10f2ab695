"""What tests share: a tiny hybrid model as a folder, a small data file, the commands run as a user runs them."""

import gc
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from forked_commands import READ_AT_IMPORT, run_alone, run_forked, start_server
from helpers import RECIPES, TINY_HYBRID
from qlora_lowmem import virtual_gpu
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.virtual_gpu.build import ensure_built

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: else the slowest run last, one process alone with each."""
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


def pytest_collection_finish() -> None:
    """What the libraries made as they were imported lives as long as the process: collections need not walk over it.

    Each would take half a second of it otherwise, and a run that trains, or a session of pytest, makes one or more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only the config.json of a four-layer Granite hybrid."""
    folder = tmp_path_factory.mktemp("tiny-hybrid")
    (folder / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | TINY_HYBRID))
    return folder


@pytest.fixture
def tiny_recipe(tiny_hybrid: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The optimised recipe on the tiny hybrid with dropout, on a CPU; changes by field, `output_dir` by name."""

    def make(output: str, **changes: Any) -> Recipe:
        small = {"model": str(tiny_hybrid), "device": "cpu", "max_seq_length": 24, "gradient_accumulation_steps": 2}
        small |= {"max_steps": 6, "save_steps": 1, "save_total_limit": 3, "lora_dropout": 0.1}
        return load_recipe(RECIPES / "optimised.yaml", small | changes | {"output_dir": str(tmp_path / output)})

    return make


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Eight short conversations as JSON Lines."""
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus one?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def built() -> None:
    """Skip where this machine cannot host a virtual GPU."""
    try:
        ensure_built()
    except virtual_gpu.VirtualGPUUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def recipe_runs(built: None) -> Iterator[virtual_gpu.Server]:
    """A server of virtual runs, one for all tests: its imports are what takes long."""
    del built
    with recipe_server(max_workers=2) as server:
        yield server


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m qlora_lowmem.NAME ARGUMENTS` and return what it printed and its exit code."""

    start_server()

    def run(name: str, *arguments: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        run_it = run_alone if READ_AT_IMPORT & env.keys() else run_forked
        return run_it(f"qlora_lowmem.{name}", arguments, {**os.environ, **env}, timeout)

    return run
