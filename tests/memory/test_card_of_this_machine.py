"""The GPU of this machine as a card; the virtual GPU is the GPU here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.memory.device import _used_by_others

_CODE = """
import json, os, torch
if HELD:
    held = torch.zeros(HELD >> 2, device="cuda:0")  # on this machine's first card
os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE
from qlora_lowmem.memory.device import card_of_this_machine
card = card_of_this_machine()
figures = [card.total_bytes, card.usable_bytes, card.context_bytes]
print(json.dumps([card.name, card.title, *figures, card.sources["usable_bytes"]]))
"""


def asked(tmp_path: Path, card: virtual_gpu.Card, *, held: int = 0, count: int = 1, visible: str = "0") -> list[Any]:
    """What is said of the card in a process that holds memory on the machine's first one."""
    code = f"HELD, VISIBLE = {held}, {visible!r}\n{_CODE}"
    with (tmp_path / "card.json").open("w+") as file:
        assert virtual_gpu.run([sys.executable, "-c", code], card, count=count, stdout=file).exit_code == 0
        file.seek(0)
        content: list[Any] = json.load(file)
    return content


def test_a_card_with_nothing_on_it_is_all_usable(tmp_path: Path) -> None:
    card = virtual_gpu.get_card("rtx-3060-12gb")
    name, title, total, usable, context, source = asked(tmp_path, card)
    assert (name, title, total, context) == (card.name, card.title, card.total_bytes, card.context_bytes)
    assert usable == total
    assert "0 bytes that NVML showed in use" in source


@pytest.mark.parametrize(("visible", "taken"), [("0,1", True), ("1", False), ("1,0", False)])
def test_the_card_is_the_one_that_torch_takes_first(tmp_path: Path, visible: str, taken: bool) -> None:
    """NVML numbers all cards of the machine, whatever CUDA_VISIBLE_DEVICES leaves of them and in which order."""
    card, held = virtual_gpu.get_card("rtx-3060-12gb"), 2**30
    _, _, total, usable, context, _ = asked(tmp_path, card, held=held, count=2, visible=visible)
    assert total - usable == (held + context if taken else 0)


def test_a_card_that_nvml_does_not_know_is_told() -> None:
    with pytest.raises(UsageError, match=r"--gpu: what is free on the GPU 1234 .*--card"):
        _used_by_others("1234")
