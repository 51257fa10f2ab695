"""The recipes of the matrix, in the order of its table."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
ORDER = [
    "baseline",
    "r8",
    "seq1024",
    "checkpointing",
    "targets-qv",
    "fused-loss",
    "optimised",
    "optimised-qv",
    "seq512",
    "seq256",
    "r4",
    "accumulation16",
    "lean",
]
