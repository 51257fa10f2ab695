"""What a block of memory is: its owner says so, or the scope and the Python frames of its allocation.

Of a recipe's job much is known: its libraries, its model, the files of `lean`. Of a program that is not ours only its
modules' names and what torch itself does. A namer is what differs; all else of an attribution is the same.
"""

import functools
import linecache
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from qlora_lowmem.lean.families import HOLDS, Holding
from qlora_lowmem.memory.history import BEFORE, Block, Frame

if TYPE_CHECKING:  # these import torch, and tables are made without it
    from torch import nn

    from qlora_lowmem.memory.scopes import Scope

ModuleType = Literal["attention", "mamba", "mlp", "norm", "loss", "other"]
_TYPES = {"attention": "attention", "mamba": "Mamba scan", "mlp": "MLP", "norm": "norm", "other": "other"}

# In the order of a table: what is always there, what the step keeps, what it works with, what is nobody's.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "weights_4bit": "base weights, 4-bit",
        "quantisation": "quantisation constants",
        "weights_other": "embeddings, norms and other base weights",
        "weights": "weights and buffers",
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
_LOSSES = ("/trl/kernels/chunked_logprob.py", "/transformers/loss/")
_OUTSIDE_OF_MODULES = {
    "/torch/nn/utils/clip_grad": "optimizer_step",
    **dict.fromkeys(("/torch/optim/", "/bitsandbytes/optim/"), "optimizer"),
    **dict.fromkeys(("/accelerate/", "/transformers/trainer", "/trl/trainer/", "/torch/utils/data/"), "input"),
}
_OFFLOADING = "activation_offload"
_LEAN = "/qlora_lowmem/lean/"
# Code that works for other code: the line that owns a block is the first one outside of it.
_LIBRARIES = (
    "/torch/",
    "/bitsandbytes/",
    "/accelerate/",
    "/einops/",
    "/transformers/integrations/",
    "/qlora_lowmem/memory/scopes.py",
)


class RecipeNamer:
    """Knows the libraries of a recipe's job, its trainer and `lean`."""

    start = "at the start of the step"  # the moment of a peak that came before anything was followed
    weights = "weights_other"  # the kind of what is neither quantised nor an adapter's

    def owner_name(self, name: str, part: str) -> str:
        """Of a tensor that belongs to the parameter or buffer `name` as `part` (`.grad`), or is it (no part)."""
        return f"{plain_name(name) or 'parameter'}{part}"

    def is_adapter(self, _name: str, parameter: "nn.Parameter") -> bool:
        """Whether a parameter that is not quantised is an adapter's."""
        return parameter.requires_grad

    def kind(self, scope: "Scope | None", block: Block) -> str:
        """The key in `KINDS` of a block that no known tensor lives in."""
        frames = block.frames
        if _dequantises(frames):
            return "dequantised"
        held = [_held_by_lean(frame["filename"]) for frame in frames]
        if "loss" in held or any(fragment in frame["filename"] for frame in frames for fragment in _LOSSES):
            return "loss"
        if scope is None and not frames and block.born != BEFORE:
            return "loss"  # autograd before its first node of the model: from the loss' last operations
        if scope is None or scope.phase in ("between", "outside"):
            return _outside_of_modules(frames)
        if scope.phase == "optimizer":
            return "optimizer_step"
        if scope.phase == "backward" and any(_OFFLOADING in frame["filename"] for frame in frames[:8]):
            return "checkpoints"
        # By the innermost code of ours that computes something of one kind; the code around it only calls.
        lean = next((kind for kind in held if kind is not None and kind != "checkpoints"), None)
        ours = next((kind for kind, f in zip(held, frames, strict=True) if "/qlora_lowmem/" in f["filename"]), None)
        if lean is None and scope.phase == "forward" and ours == "checkpoints":
            return "checkpoints"
        module_type = lean or scope.module_type
        if module_type == "loss":
            return "loss"
        return f"{'backward' if _goes_back(frames, held) else _PREFIX[scope.phase]}_{module_type}"

    def line(self, scope: "Scope | None", block: Block) -> str:
        """The line of code that owns a block; what was there before has frames if it came in the step before."""
        if block.born == BEFORE and not block.frames:
            return "before the recorded step"
        return owner_line(block.frames, scope)


class ProgramNamer:
    """Knows torch, and of anyone's program what names say. Methods as `RecipeNamer` has them.

    `root` is the beginning of the paths of the program's own code, left out of lines.
    """

    start = "at the start"
    weights = "weights"  # of anyone's program nobody knows which are a base model's

    def __init__(self, root: str = "") -> None:
        self._root = root

    def owner_name(self, name: str, _part: str) -> str:
        """What belongs to a parameter goes by its name."""
        return name

    def is_adapter(self, name: str, _parameter: "nn.Parameter") -> bool:
        """By PEFT's names: anyone's parameters may be trained."""
        return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta"))

    def kind(self, scope: "Scope | None", block: Block) -> str:
        """By the scope; outside of modules, by what its functions are called."""
        if scope is None or scope.phase == "outside":
            computes_loss = any("loss" in f["name"] or "cross_entropy" in f["name"] for f in block.frames[:6])
            return "loss" if computes_loss else "input"
        if scope.phase == "optimizer":
            return "optimizer_step"
        return "loss" if scope.module_type == "loss" else f"{_PREFIX[scope.phase]}_{scope.module_type}"

    def line(self, scope: "Scope | None", block: Block) -> str:
        """The line of code that owns a block."""
        if block.born == BEFORE:
            return "before the test"
        return owner_line(block.frames, scope).removeprefix(self._root)


Namer = RecipeNamer | ProgramNamer


@functools.cache
def _held_by_lean(path: str) -> Holding | None:
    """The kind of memory that a file holds, as `lean` declares it; None outside of `lean`."""
    _, inside, file = path.rpartition(_LEAN)
    return HOLDS.get(file) if inside else None


def _outside_of_modules(frames: Sequence[Frame]) -> str:
    """By the innermost code that is not torch's or bitsandbytes' own."""
    for path in (frame["filename"] for frame in frames):
        kind = next((kind for part, kind in _OUTSIDE_OF_MODULES.items() if part in path), None)
        if kind is not None:
            return kind
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


def _goes_back(frames: Sequence[Frame], held: Sequence[str | None]) -> bool:
    """Within a backward that runs inside a recomputed layer, where hooks see the forward before it."""
    if frames and frames[0]["name"] == "_engine_run_backward":  # a node of C++ that `torch.autograd.grad` came to
        return True
    computing = (frame for frame, kind in zip(frames, held, strict=True) if kind is not None and kind != "checkpoints")
    return any("backward" in frame["name"] for frame in computing)


def owner_line(frames: Sequence[Frame], scope: "Scope | None") -> str:
    """`file:line function` of the innermost frame that is not a library serving it, or the autograd node that ran."""
    for frame in frames:
        if not any(part in frame["filename"] for part in _LIBRARIES) and frame["filename"].endswith(".py"):
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


_WRAPPERS = ("base_model.model.", "base_model.", "module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A module's name as the base model knows it, without PEFT's wrapper."""
    if name in ("base_model", "base_model.model"):
        return ""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def module_type(model: "nn.Module", name: str) -> ModuleType:
    """What kind of work the module `name` does: its own class decides, or the nearest parent's that says something.

    What runs in the model's outermost modules is the LM head and the loss; within the decoder but in none of the kinds
    (residual additions, embeddings) is `other`.
    """
    while True:
        found = _own_type(type(model.get_submodule(name)).__name__, name.rpartition(".")[2])
        if found is not None:
            return found
        if not name:
            return "loss"
        name = name.rpartition(".")[0]


def _own_type(class_name: str, leaf: str) -> ModuleType | None:
    text = class_name.lower()
    if "norm" in text:
        return "norm"
    if leaf == "lm_head" or "forcausallm" in text:
        return "loss"
    if leaf.startswith("lora_") or text.startswith("lora"):
        return None  # an adapter is part of what it adapts
    if "mamba" in text:
        return "mamba"
    if "attention" in text or leaf == "self_attn":
        return "attention"
    if text.endswith(("mlp", "moe", "experts", "router")) or leaf == "mlp":
        return "mlp"
    return "other" if text.endswith(("layer", "model", "embedding")) else None


_WORDS: Mapping[str, ModuleType] = MappingProxyType(
    {
        "norm": "norm",
        "mamba": "mamba",
        "attention": "attention",
        "attn": "attention",
        "mlp": "mlp",
        "feedforward": "mlp",
        "lm_head": "loss",
        "loss": "loss",
    }
)


def type_by_words(name: str, module: "nn.Module") -> ModuleType:
    """What kind of work a module of anyone's does, by its class and the last part of its name; or `other`."""
    text = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return next((kind for word, kind in _WORDS.items() if word in text), "other")
