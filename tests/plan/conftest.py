"""One server of virtual runs for all tests of this folder: its imports are what takes long."""

from collections.abc import Iterator

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.probes.runs import recipe_server


@pytest.fixture(scope="session")
def planning_server() -> Iterator[virtual_gpu.Server]:
    """Its workers are started by the first job, one kind of card after the other."""
    with recipe_server() as server:
        yield server
