"""The phases of a run's life, of which each is asked of the server."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.plan.questions import live
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.scratch import scratch_folder


class Killed(BaseException):
    """As good as SIGKILL: what was made stays, and the process that held it is gone."""


def test_what_a_killed_one_leaves_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with the model is one that the next command knows."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders: list[Path] = []

    class Server:
        def submit(self, _function: str, arguments: dict[str, Any], _card: virtual_gpu.Card) -> Any:
            folders.append(Path(arguments["folder"]))
            raise Killed

    with pytest.raises(Killed):
        live(load_recipe(RECIPES / "optimised.yaml"), virtual_gpu.get_card("t4-16gb"), Server())  # type: ignore[arg-type]
    (left,) = folders
    left.mkdir()
    os.utime(left, (time.time() - 3600,) * 2)
    with scratch_folder():
        assert not left.exists()
