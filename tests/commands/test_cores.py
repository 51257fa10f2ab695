"""What computes on a CPU leaves the cores to others while it waits: said before torch, which reads it, is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import RECIPES, ROOT
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run_folder.ownership import Marker

# Where torch would be imported, the process says what it would read, and ends.
PROGRAM = """
import os, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
from qlora_lowmem.commands import frame
sys.exit(frame.main(sys.argv[1:]))
"""
TRAIN = ("train", "--config", str(RECIPES / "optimised.yaml"), "--data", "synthetic", "--device")


def policy(*words: str, said: str | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"PYTHONPATH": str(ROOT / "src")} | ({} if said is None else {"OMP_WAIT_POLICY": said})
    command = [sys.executable, "-c", PROGRAM, *words]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(("device", "said", "read"), [("cpu", None, "passive"), ("cpu", "active", "active")])
def test_training_on_a_cpu_lets_threads_sleep_unless_one_chose_otherwise(
    tmp_path: Path, device: str, said: str | None, read: str
) -> None:
    assert policy(*TRAIN, device, "--output-dir", str(tmp_path), said=said) == read


def test_training_on_a_gpu_is_left_as_it_is(tmp_path: Path) -> None:
    assert policy(*TRAIN, "cuda", "--output-dir", str(tmp_path)) == "None"


def test_so_do_merging_and_asking(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    Marker.of(load_recipe(RECIPES / "optimised.yaml", {"device": "cpu"})).write(tmp_path)
    run = ("--run", str(tmp_path))
    assert policy("generate", *run, "--prompt", "x") == "passive"
    assert policy("merge", *run, "--to", str(tmp_path / "merged"), "--device", "cpu") == "passive"
