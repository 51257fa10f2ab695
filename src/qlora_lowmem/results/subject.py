"""What a picture is of: the model, the length of a sequence, the recipe, the card."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_lowmem.files import Count


@dataclass(frozen=True)
class _Base:
    model: str = ""


@dataclass(frozen=True)
class _Batch:
    max_seq_length: Count = 0
    batch_size: Count = 1


@dataclass(frozen=True)
class Said:
    """Of a recipe as a file holds it, what a picture says of it; all of it may be absent."""

    name: str | None = None
    base: _Base = field(default_factory=_Base)
    batch: _Batch = field(default_factory=_Batch)

    @property
    def model(self) -> str:
        """The model's name; empty where it is not known."""
        return model_names([self.base.model])

    @property
    def length(self) -> str:
        """Tokens of a micro-batch, `2 x 1,024 tokens`; empty where they are not known."""
        samples = f"{self.batch.batch_size} x " if self.batch.batch_size != 1 else ""
        return f"{samples}{self.batch.max_seq_length:,} tokens" if self.batch.max_seq_length else ""


def model_names(models: Iterable[str]) -> str:
    """Each model once, by the last part of its hub id or path: `granite-4.0-h-1b`."""
    return ", ".join(dict.fromkeys(re.split(r"[/\\]", model.rstrip("/\\"))[-1] for model in models if model))


def subject(*parts: str, on: str) -> str:
    """Those parts that are known, and the card."""
    known = ", ".join(dict.fromkeys(part for part in parts if part))
    return f"{known}, on {on}" if known else on
