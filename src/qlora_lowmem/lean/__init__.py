"""Training steps that need less memory, with the same loss and gradients: one idea a file.

`apply_lean` switches them on in a model. The arithmetic that justifies an idea stands at the top of its file.
"""

from typing import TYPE_CHECKING, Any

from qlora_lowmem.lean.options import Checkpointing, Idea, LeanOptions, LeanReport, RefusedOptionError

if TYPE_CHECKING:
    from qlora_lowmem.lean.apply import apply_lean, foresee_lean, quantise_embeddings

__all__ = [
    "Checkpointing",
    "Idea",
    "LeanOptions",
    "LeanReport",
    "RefusedOptionError",
    "apply_lean",
    "foresee_lean",
    "quantise_embeddings",
]


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first asked for; options and families need none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qlora_lowmem.lean import apply

    return getattr(apply, name)
