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
    "torch._inductor.utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor._api",
    "sympy",
)
PROGRAM = f"""
import gc, sys, threading
from qlora_lowmem.run.imports import heavy_imports
with heavy_imports():
    from importlib.metadata import packages_distributions
    of_meanwhile = packages_distributions()
    assert of_meanwhile.get("yaml") == ["PyYAML"] and "yaml" in of_meanwhile and len(of_meanwhile) > 20
    from qlora_lowmem.run.execute import execute
import transformers
assert gc.isenabled() and gc.get_freeze_count() > 100_000
import torch
found = [name for name in {LEFT_OUT} if name in sys.modules]
assert not found, found
from bitsandbytes.cextension import CudaBNBNativeLibrary, lib
assert isinstance(lib, CudaBNBNativeLibrary)
import torch.distributed.tensor as sharding
assert not isinstance(torch.ones(1), sharding.DTensor)
# Nor is it for what a step asks.
weight = torch.ones(2, requires_grad=True)
torch.autograd.grad(weight * 2, weight, torch.ones(2))
torch.cuda.memory._record_memory_history(stacks="python")
kept = torch.empty(1, device="cuda")
frames = [each for segment in torch.cuda.memory._snapshot()["segments"] for block in segment["blocks"]
          for each in block.get("frames", ())]
assert __file__ in [frame["filename"] for frame in frames]
assert not [name for name in {LEFT_OUT} if name in sys.modules]
from huggingface_hub.utils import send_telemetry
send_telemetry("nothing")
assert threading.active_count() == 1
# What is asked for all the same is there.
assert torch.export.Dim("tokens").__name__ == "tokens"
from torch.fx.experimental.symbolic_shapes import ShapeEnv, sym_eq
assert sym_eq((2, 3), (2, 3)) is True and "sympy" in sys.modules
from trl.import_utils import PACKAGE_DISTRIBUTION_MAPPING as distributions
assert distributions["yaml"] == ["PyYAML"]
try:
    raise SystemExit(f"nobody brought {{distributions['no_such_package']}}")
except KeyError:
    pass
fetch = transformers.utils.import_utils.fetch__all__
assert fetch('a = 1\\n__all__ = ["b", "c"]\\nd = __all__\\n') == ["b", "c"]
assert fetch('__all__ = [\\n    "b",\\n]\\n') == ["b"]
assert fetch("the __all__ of none") == []
assert torch.library.infer_schema and ".py:" in torch._library.utils.get_source(1)
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
