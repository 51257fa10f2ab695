"""What a block of memory is: its owner says so, or the scope and the Python frames of its allocation."""

import linecache
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from qlora_lowmem.memory.history import Frame

if TYPE_CHECKING:  # these import torch, and tables are made without it
    from qlora_lowmem.memory.owners import Owner
    from qlora_lowmem.memory.scopes import ModuleType, Scope

_TYPES = {"attention": "attention", "mamba": "Mamba scan", "mlp": "MLP", "norm": "norm", "other": "other"}

# In the order of a table: what is always there, what the step keeps, what it works with, what is nobody's.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "weights_4bit": "base weights, 4-bit",
        "quantisation": "quantisation constants",
        "weights_other": "embeddings, norms and other base weights",
        "adapters": "adapters",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "checkpoints": "checkpointed activations",
        **{f"activations_{key}": f"activations: {text}" for key, text in _TYPES.items()},
        **{f"recomputed_{key}": f"recomputed activations: {text}" for key, text in _TYPES.items()},
        **{f"backward_{key}": f"gradients of activations: {text}" for key, text in _TYPES.items()},
        "dequantised": "dequantised weights (workspace)",
        "loss": "loss and logits",
        "optimizer_step": "optimizer step (workspace)",
        "libraries": "library workspaces (cuBLAS)",
        "input": "input batch and other",
        "rounding": "allocator rounding",
        "unexplained": "unexplained",
        "slack": "allocator slack (reserved, not allocated)",
        "outside": "CUDA context, outside the allocator",
    }
)
OUTSIDE_ALLOCATED = ("slack", "outside")  # all others are parts of `memory_allocated`

_PREFIX = {"forward": "activations", "recompute": "recomputed", "backward": "backward"}
# Fragments of paths: whose code is running, for frames that the scope says nothing about.
_LOSS_FILES = ("/trl/kernels/chunked_logprob.py", "/transformers/loss/", "/qlora_lowmem/lean/loss.py")
_LEAN_TYPES: Mapping[str, "ModuleType"] = {
    "/qlora_lowmem/lean/scan.py": "mamba",
    "/qlora_lowmem/lean/convolution.py": "mamba",
    "/qlora_lowmem/lean/attention.py": "attention",
    "/qlora_lowmem/lean/swiglu.py": "mlp",
    "/qlora_lowmem/lean/norms.py": "norm",
}
_CLIPPING = ("/torch/nn/utils/clip_grad",)
_OPTIMIZERS = ("/torch/optim/", "/bitsandbytes/optim/")
_TRAINERS = ("/accelerate/", "/transformers/trainer", "/trl/trainer/", "/torch/utils/data/")
_LEAN_CHECKPOINTS = "/qlora_lowmem/lean/checkpointing.py"
_OFFLOADING = "activation_offload"
# Code of libraries that serves others: the line that owns a block is the first one outside of it.
_SERVANTS = (
    "/torch/",
    "/bitsandbytes/",
    "/accelerate/",
    "/einops/",
    "/transformers/integrations/",
    "/memory/scopes.py",
)


def kind_of(owner: "Owner | None", scope: "Scope | None", frames: Sequence[Frame], before: bool = False) -> str:
    """The key in `KINDS` of a block.

    Args:
        owner: the tensor known to live in it, if any.
        scope: where the step was when it was allocated, if that is known.
        frames: of its allocation, innermost first.
        before: whether it was there before the recording began.
    """
    if owner is not None:
        return owner.kind
    if _dequantises(frames):
        return "dequantised"
    if any(fragment in frame["filename"] for frame in frames for fragment in _LOSS_FILES):
        return "loss"
    if scope is None and not frames and not before:
        return "loss"  # autograd before its first node of the model: from the loss' last operations
    if scope is None or scope.phase == "between":
        return _outside_of_modules(frames)
    if scope.phase == "optimizer":
        return "optimizer_step"
    if scope.phase == "backward" and any(_OFFLOADING in frame["filename"] for frame in frames[:8]):
        return "checkpoints"
    lean = _lean_type(frames)
    if lean is None and scope.phase == "forward" and _innermost_of_ours(frames).endswith(_LEAN_CHECKPOINTS):
        return "checkpoints"
    module_type = lean or scope.module_type
    if module_type == "loss":
        return "loss"
    return f"{'backward' if _goes_back(frames) else _PREFIX[scope.phase]}_{module_type}"


def _outside_of_modules(frames: Sequence[Frame]) -> str:
    """By the innermost code that is not torch's or bitsandbytes' own."""
    for frame in frames:
        path = frame["filename"]
        if any(part in path for part in _CLIPPING):
            return "optimizer_step"
        if any(part in path for part in _OPTIMIZERS):
            return "optimizer"
        if any(part in path for part in _TRAINERS):
            return "input"
        if not any(part in path for part in ("/torch/", "/bitsandbytes/")):
            break
    return "unexplained"


def _dequantises(frames: Sequence[Frame]) -> bool:
    """In bitsandbytes' dequantisation, but for the product that its fallback makes in the same function."""
    for frame in frames[:12]:
        if "/bitsandbytes/" not in frame["filename"]:
            continue
        if "dequant" in frame["name"]:
            return ".linear(" not in linecache.getline(frame["filename"], frame["line"])
    return False


def _lean_type(frames: Sequence[Frame]) -> "ModuleType | None":
    for frame in frames:
        for path, module_type in _LEAN_TYPES.items():
            if frame["filename"].endswith(path):
                return module_type
    return None


def _goes_back(frames: Sequence[Frame]) -> bool:
    """Within a backward that runs inside a recomputed layer, where hooks see the forward before it."""
    if frames and frames[0]["name"] == "_engine_run_backward":  # a node of C++ that `torch.autograd.grad` came to
        return True
    return any("backward" in frame["name"] and frame["filename"].endswith(tuple(_LEAN_TYPES)) for frame in frames)


def _innermost_of_ours(frames: Sequence[Frame]) -> str:
    return next((f["filename"] for f in frames if "/qlora_lowmem/" in f["filename"]), "")


def owner_line(frames: Sequence[Frame], scope: "Scope | None") -> str:
    """`file:line function` of the innermost frame that is not a library serving it, or the autograd node that ran."""
    for frame in frames:
        if not any(part in frame["filename"] for part in _SERVANTS) and frame["filename"].endswith(".py"):
            return line_of(frame)
    if scope is not None and scope.node:
        return f"autograd: {scope.node}"
    return line_of(frames[0]) if frames else "autograd"


def line_of(frame: Frame) -> str:
    """A frame as `package/file.py:line function`, without the machine's own folders."""
    path: str = frame["filename"]
    for root in ("/site-packages/", "/src/"):
        path = path.rpartition(root)[2]
    return f"{path.removeprefix('/')}:{frame['line']} {frame['name']}"
