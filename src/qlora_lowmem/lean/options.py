"""What can be switched on, and what a model took of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

_SHORT_TILE, _LONG_TILE, _FEED_FORWARD_TILE = 512, 2048, 1024

Checkpointing = Literal["layer", "segments", "host"]
Scan = Literal["auto", "plain", "triton"]


class RefusedOptionError(ValueError):
    """An option that this model, or the device it is on, cannot take.

    Attributes:
        option: the field of `LeanOptions`; `lean` where the model takes nothing of it.
        reason: why.
    """

    def __init__(self, option: str, value: object, reason: str, advice: str) -> None:
        super().__init__(f"{option}={value!r}: {reason}; {advice}")
        self.option = option
        self.reason = reason


@dataclass(frozen=True)
class LeanOptions:
    """The ideas of this package, each a field. The defaults are the lean recipe.

    Args:
        tile_length: tokens of a tile of a decoder layer. Smaller: less memory, more launches and more sweeps. None
            chooses by the sequence: 512 up to 2,048 tokens, above it a quarter of the sequence, at most 2,048 (a tile
            of Granite-4.0-H-1B works in about 0.1 MiB a token, so it stays small beside the checkpoints). A pass
            without gradients takes two tiles at a time.
        feed_forward_tile_length: tokens of a tile of the feed-forward part, at most tile_length. None: up to 1,024.
        scan_chunk_length: tokens of a chunk of the Mamba-2 scan. The result does not depend on it.
        scan: `plain` PyTorch, `triton` kernels (see `scan_triton.py`), or `auto`: Triton where it works.
        checkpointing: which layer inputs are kept: `layer`, `segments` or `host` (pinned host memory; see
            `checkpointing.py` for how much).
        loss_tile_bytes: bytes of the logits that exist at a time.
        dequantised_tile_bytes: bytes of a 4-bit layer's weight that exist dequantised at a time.
        quantised_embeddings: None, 8 or 4 bits for the embedding and the LM head. Changes the model a little.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    tile_length: int | None = None
    feed_forward_tile_length: int | None = None
    scan_chunk_length: int = 64
    scan: Scan = "auto"
    checkpointing: Checkpointing = "segments"
    loss_tile_bytes: int = 64 * 2**20
    dequantised_tile_bytes: int = 16 * 2**20
    quantised_embeddings: Literal[8, 4] | None = None

    def __post_init__(self) -> None:
        lengths = "tile_length", "feed_forward_tile_length", "scan_chunk_length"
        for name in (*lengths, "loss_tile_bytes", "dequantised_tile_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1; leave it out for the default")
        if self.checkpointing not in ("layer", "segments", "host"):
            raise ValueError(f"checkpointing={self.checkpointing!r}: allowed are layer, segments and host")
        if self.scan not in ("auto", "plain", "triton"):
            raise ValueError(f"scan={self.scan!r}: allowed are auto, plain and triton")
        if self.quantised_embeddings not in (None, 8, 4):
            raise ValueError(f"quantised_embeddings={self.quantised_embeddings!r}: allowed are 8, 4 and None")

    def tiles_for(self, seq: int) -> tuple[int, int]:
        """Tile lengths of a layer and of its feed-forward part, in tokens, for a sequence of `seq`."""
        tile = self.tile_length or min(max(_SHORT_TILE, seq // 4), _LONG_TILE)
        return tile, min(self.feed_forward_tile_length or _FEED_FORWARD_TILE, tile)


@dataclass(frozen=True)
class Idea:
    """One idea, whether it works in this model, and where or why not, in words for a person."""

    name: str
    applied: bool
    detail: str


@dataclass(frozen=True)
class LeanReport:
    """What `apply_lean` did to a model."""

    model_class: str
    ideas: tuple[Idea, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        return tuple(idea.name for idea in self.ideas if idea.applied)

    @property
    def not_applied(self) -> tuple[Idea, ...]:
        return tuple(idea for idea in self.ideas if not idea.applied)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the model's class, and each idea with whether it is applied and where or why not."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"lean on {self.model_class}:"]
        lines += [f"  {'on ' if idea.applied else 'OFF'} {idea.name}: {idea.detail}" for idea in self.ideas]
        return "\n".join(lines)
