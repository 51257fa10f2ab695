"""The table of cards: what each reports about itself, and where every figure comes from (`cards.toml`)."""

import dataclasses
import functools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import UnknownCardError

_TABLE = Path(__file__).with_name("cards.toml")

# Set in every process on a virtual GPU: the card's name, and its memory where that is not the table's.
CARD_VARIABLE = "QLORA_LOWMEM_VIRTUAL_CARD"
MEMORY_VARIABLE = "QLORA_LOWMEM_VIRTUAL_CARD_BYTES"


@dataclass(frozen=True)
class Card:
    """A kind of GPU. All sizes are bytes, all clocks kHz.

    Attributes:
        name: how people write it, `rtx-4050-laptop-6gb`.
        title: the name that CUDA reports.
        total_bytes: the memory that CUDA reports.
        usable_bytes: what a job, its context included, can count on beside a desktop and the driver's reservation.
        context_bytes: what a process' CUDA context takes of it, before any allocation.
        compute_capability: `(8, 9)` for sm_89.
        sources: where each figure comes from, with its date; says so where one is an assumption.
    """

    name: str
    title: str
    total_bytes: int
    usable_bytes: int
    context_bytes: int
    compute_capability: tuple[int, int]
    sm_count: int
    threads_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int
    shared_per_block_optin: int
    l2_bytes: int
    bus_width_bits: int
    clock_khz: int
    memory_clock_khz: int
    sources: Mapping[str, str] = dataclasses.field(repr=False, compare=False)

    @property
    def supports_bf16(self) -> bool:
        """Whether the card multiplies bfloat16 matrices itself: compute capability 8.0 (Ampere) and later."""
        return self.compute_capability >= (8, 0)

    def with_memory(self, total_bytes: int) -> "Card":
        """The same kind of card with another amount of memory, to ask what a job would need.

        What is set aside for a desktop stays the same.

        Raises:
            ValueError: less than the context takes.
        """
        if total_bytes <= self.context_bytes:
            raise ValueError(
                f"{total_bytes} bytes is not a card's memory: the CUDA context alone takes {self.context_bytes}"
            )
        set_aside = self.total_bytes - self.usable_bytes
        usable = max(total_bytes - set_aside, self.context_bytes)
        sources = dict(self.sources) | {"total_bytes": "set by the caller", "usable_bytes": "set by the caller"}
        return dataclasses.replace(
            self, total_bytes=total_bytes, usable_bytes=usable, sources=MappingProxyType(sources)
        )


@functools.cache
def _table() -> Mapping[str, Card]:
    data = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: _card(name, row, data["architecture"]) for name, row in data["card"].items()}


def _card(name: str, row: dict[str, Any], architectures: dict[str, dict[str, Any]]) -> Card:
    row = dict(row)
    sources = MappingProxyType(dict(row.pop("sources")))
    fields = architectures[row.pop("architecture")] | row
    major, minor = fields.pop("compute_capability")
    return Card(name=name, compute_capability=(major, minor), sources=sources, **fields)


def all_cards() -> tuple[Card, ...]:
    """Every card of the table, the smallest first."""
    return tuple(sorted(_table().values(), key=lambda card: (card.total_bytes, card.name)))


def get_card(name: str) -> Card:
    """The card of that name.

    Raises:
        UnknownCardError: there is none; the message lists close matches and all names.
    """
    card = _table().get(name)
    if card is None:
        raise UnknownCardError(name, _table())
    return card


def current_card() -> Card | None:
    """The card that this process runs on, or None where it is not on a virtual GPU."""
    name = os.environ.get(CARD_VARIABLE)
    if not name:
        return None
    card = get_card(name)
    memory = os.environ.get(MEMORY_VARIABLE)
    return card.with_memory(int(memory)) if memory else card
