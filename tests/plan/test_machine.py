"""The GPU of this machine as a card; the virtual GPU is the GPU here."""

import json
import sys
from pathlib import Path

from qlora_lowmem import virtual_gpu

_CODE = """
import json
from qlora_lowmem.plan.machine import card_of_this_machine
card = card_of_this_machine()
figures = [card.total_bytes, card.usable_bytes, card.context_bytes]
print(json.dumps([card.name, card.title, *figures, card.sources["usable_bytes"]]))
"""


def test_a_card_with_nothing_on_it_is_all_usable(tmp_path: Path) -> None:
    card = virtual_gpu.get_card("rtx-3060-12gb")
    with (tmp_path / "card.json").open("w+") as file:
        assert virtual_gpu.run([sys.executable, "-c", _CODE], card, stdout=file).exit_code == 0
        file.seek(0)
        name, title, total, usable, context, source = json.load(file)
    assert (name, title, total, context) == (card.name, card.title, card.total_bytes, card.context_bytes)
    assert usable == total
    assert "0 bytes that NVML showed in use" in source
