"""Training steps that need less memory, with the same loss and gradients: one idea a file.

`apply_lean` switches them on in a model. The arithmetic that justifies an idea stands at the top of its file.
"""

from qlora_lowmem.lean.apply import apply_lean, foresee_lean, quantise_embeddings
from qlora_lowmem.lean.options import Checkpointing, Idea, LeanOptions, LeanReport, RefusedOptionError

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
