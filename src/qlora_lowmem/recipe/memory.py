"""The sections on memory itself: what trades time for it, the lean implementations, the limit to stay under."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from qlora_lowmem.recipe.sections import knob
from qlora_lowmem.units import parse_bytes


@dataclass(frozen=True)
class Memory:
    """What trades time for memory, and the limit to stay under."""

    gradient_checkpointing: bool = field(
        default=True,
        metadata=knob(
            "keep only each layer's input and compute the rest again in backward (about a third more time)",
            "activations fall from all layers' insides to one layer's: the strongest knob",
        ),
    )
    loss: Literal["fused", "full"] = field(
        default="fused",
        metadata=knob(
            "cross-entropy in chunks fused with the LM head, or from the full logits",
            "full holds (batch, seq, vocabulary) logits, more than once and partly in fp32; fused never does",
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=knob("keep what backward needs in host memory", "moves activations to the host, at the speed of PCIe"),
    )
    expandable_segments: bool = field(
        default=False,
        metadata=knob(
            "let PyTorch's caching allocator grow its segments",
            "less fragmentation: can lower reserved bytes, not allocated ones",
        ),
    )
    max_memory: str | int = field(
        default="100%",
        metadata=knob(
            'cap of the GPU memory: "N%" of the card, a size such as "5.5 GiB", or bytes',
            "a real cap on PyTorch's allocator: beyond it the run fails and nothing spills to the host",
            kind="memory",
        ),
    )

    def memory_limit_bytes(self, total_bytes: int) -> int:
        """The cap in bytes on a card of `total_bytes`; a size above the card is the card."""
        return min(parse_memory_limit(self.max_memory, total_bytes), total_bytes)


@dataclass(frozen=True)
class Lean:
    """The project's own low-memory implementations: the same loss and gradients from less memory."""

    lean: bool = field(
        default=False,
        metadata=knob(
            "run decoder layers, LM head and loss tile by tile along the sequence; exact, plain PyTorch",
            "a layer's working set is one tile's, whatever the sequence",
        ),
    )
    tile_length: int | None = field(
        default=None,
        metadata=knob(
            "tokens of a tile of a decoder layer; null is 512 up to 4,096 tokens, then an eighth, 2,048 at most",
            "activations of one layer grow with it; small tiles cost more launches",
            min=16,
        ),
    )
    scan_chunk_length: int = field(
        default=64,
        metadata=knob(
            "tokens of a chunk of the Mamba-2 scan; the result does not depend on it",
            "(chunk, chunk) matrices per head inside a tile",
            min=8,
        ),
    )
    scan: Literal["auto", "plain", "triton"] = field(
        default="auto",
        metadata=knob(
            "the Mamba-2 scan in plain PyTorch or by Triton kernels; auto takes Triton where it is installed and works",
            "next to none: both make a few chunks again at a time in backward",
        ),
    )
    checkpoints: Literal["layer", "segments", "host"] = field(
        default="segments",
        metadata=knob(
            "which layer inputs are kept for backward: all, about sqrt(layers) of them, or all in host memory",
            "(batch, seq, hidden) for each that is kept; host keeps none on the GPU and states what it takes of RAM",
        ),
    )
    loss_tile_bytes: int = field(
        default=64 * 2**20,
        metadata=knob("bytes of the logits that exist at a time", "the LM head's working set", min=2**20),
    )
    dequantised_tile_bytes: int = field(
        default=16 * 2**20,
        metadata=knob(
            "bytes of a 4-bit layer's weight that exist dequantised at a time",
            "else the largest layer's whole weight in the compute dtype: 48 MiB in Llama-3.2-3B, 112 MiB in an 8B",
            min=2**20,
        ),
    )
    quantised_embeddings: Literal["none", "8bit", "4bit"] = field(
        default="none",
        metadata=knob(
            "store the tied embeddings and LM head in 8 or 4 bits; changes the model a little",
            "8bit halves them, 4bit quarters them: a third of the floor of a small model",
        ),
    )


def parse_memory_limit(limit: str | int, total_bytes: int) -> int:
    """`"90%"` of `total_bytes`, rounded down; or a size, whatever the total.

    Raises:
        ValueError: not a percentage above 0 and up to 100, nor a size (`units.parse_bytes`).
    """
    if not isinstance(limit, str) or not limit.rstrip().endswith("%"):
        return parse_bytes(limit)
    digits = limit.strip()[:-1].strip()
    if not (digits.isascii() and digits.replace(".", "", 1).isdigit() and 0 < Fraction(digits) <= 100):
        raise ValueError(f"{limit!r} is not a percentage above 0 % and up to 100 %")
    return int(total_bytes * Fraction(digits) / 100)
