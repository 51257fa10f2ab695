"""What a process on a virtual card leaves out of its imports, and that it gives way where it is asked for."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.run.imports import heavy_imports

LEFT_OUT = (
    "torch._dynamo.utils",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor._api",
    "sympy",
)
PROGRAM = f"""
import gc, sys
from qlora_lowmem.run.imports import heavy_imports
with heavy_imports():
    from qlora_lowmem.run.execute import execute
assert gc.isenabled() and gc.get_freeze_count() > 100_000
import torch
found = [name for name in {LEFT_OUT} if name in sys.modules]
assert not found, found
from bitsandbytes.cextension import CudaBNBNativeLibrary, lib
assert isinstance(lib, CudaBNBNativeLibrary)
import torch.distributed.tensor as sharding
assert not isinstance(torch.ones(1), sharding.DTensor)
# What is asked for all the same is there.
assert torch.distributed.is_available()
assert sharding.Shard(0).dim == 0
assert issubclass(sharding.DTensor, torch.Tensor)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert torch._dynamo.eval_frame.OptimizedModule is not None and "torch._dynamo.utils" in sys.modules
"""


@pytest.mark.usefixtures("built")
def test_a_trial_leaves_out_what_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    log = tmp_path / "log"
    with log.open("w") as said:
        command = [sys.executable, str(tmp_path / "program.py")]
        report = virtual_gpu.run(command, virtual_gpu.get_card("rtx-4050-laptop-6gb"), stderr=said)
    assert report.exit_code == 0, log.read_text()


def test_elsewhere_all_is_imported() -> None:
    program = (
        "import sys\nfrom qlora_lowmem.run.imports import heavy_imports\nwith heavy_imports():\n"
        "    import transformers.masking_utils, torch.distributed\n"
        "assert 'torch._dynamo.utils' in sys.modules and torch.distributed.is_available()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_collector_waits_and_goes_on() -> None:
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()
