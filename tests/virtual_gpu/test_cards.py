import dataclasses

import pytest

from qlora_lowmem.virtual_gpu import UnknownCardError, all_cards, current_card, get_card
from qlora_lowmem.virtual_gpu.cards import CARD_VARIABLE, MEMORY_VARIABLE

GIB = 2**30
NAMES = [
    "rtx-2060-6gb", "rtx-3050-6gb", "rtx-3060-laptop-6gb", "rtx-4050-laptop-6gb", "rtx-4060-8gb", "t4-16gb",
    "rtx-3060-12gb", "rtx-3090-24gb", "rtx-4090-24gb", "l40s-48gb", "a100-40gb", "a100-80gb",
    "h100-80gb", "h200-141gb", "b200-180gb",
]  # fmt: skip


def test_the_cards_that_scripts_rely_on_are_there():
    assert {card.name for card in all_cards()} >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_cards_memory_is_what_its_name_says(name):
    card = get_card(name)
    nominal = int(name.rpartition("-")[2].removesuffix("gb")) * GIB
    assert 0.9 * nominal < card.total_bytes <= nominal
    assert card.context_bytes < card.usable_bytes <= card.total_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_that_decides_a_fit_has_a_source(name):
    sources = get_card(name).sources
    assert {"total_bytes", "usable_bytes", "context_bytes", "sm_count"} <= set(sources)
    fields = {field.name for field in dataclasses.fields(get_card(name))}
    assert set(sources) <= fields, "a source for a figure that is not there"


@pytest.mark.parametrize(
    ("name", "capability", "bf16"),
    [
        ("t4-16gb", (7, 5), False),
        ("rtx-2060-6gb", (7, 5), False),
        ("a100-80gb", (8, 0), True),
        ("rtx-4050-laptop-6gb", (8, 9), True),
    ],
)
def test_bf16_begins_with_ampere(name, capability, bf16):
    card = get_card(name)
    assert card.compute_capability == capability
    assert card.supports_bf16 is bf16


def test_an_unknown_card_lists_what_there_is():
    with pytest.raises(UnknownCardError) as caught:
        get_card("rtx-4050-6gb")
    message = str(caught.value)
    assert "'rtx-4050-6gb'" in message
    assert "Did you mean rtx-4050-laptop-6gb" in message
    assert all(name in message for name in NAMES)


def test_more_memory_keeps_what_a_desktop_takes():
    card = get_card("rtx-4050-laptop-6gb")
    bigger = card.with_memory(24 * GIB)
    assert bigger.total_bytes == 24 * GIB
    assert bigger.total_bytes - bigger.usable_bytes == card.total_bytes - card.usable_bytes
    assert bigger.compute_capability == card.compute_capability
    assert bigger.sources["total_bytes"] == "set by the caller"


def test_less_memory_than_the_context_is_no_card():
    card = get_card("rtx-4050-laptop-6gb")
    with pytest.raises(ValueError, match="context"):
        card.with_memory(card.context_bytes)


def test_the_current_card_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv(CARD_VARIABLE, raising=False)
    assert current_card() is None
    monkeypatch.setenv(CARD_VARIABLE, "t4-16gb")
    monkeypatch.setenv(MEMORY_VARIABLE, "")
    assert current_card() == get_card("t4-16gb")
    monkeypatch.setenv(MEMORY_VARIABLE, str(8 * GIB))
    assert current_card() == get_card("t4-16gb").with_memory(8 * GIB)
