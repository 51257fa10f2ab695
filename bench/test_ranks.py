"""What each of several cards needs: a process a card, weights copied (DDP) or shared out (FSDP2), beside one alone.

Every row is a launch that a person would type, on that many virtual cards.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import FLOOR_TEXT, gib, markdown_table, provenance_lines, times_floor, write_result

pytestmark = pytest.mark.ranks

CARD = "rtx-4050-laptop-6gb"
CONFIG = Path(__file__).with_name("distributed") / "fsdp2.yaml"
MODELS = ("granite-4.0-h-1b", "llama-3.2-3b")
LAUNCHES = [
    (model, sharding, cards)
    for model in MODELS
    for sharding, cards in (("none", 1), ("DDP", 2), ("FSDP2", 2), ("FSDP2", 4))
]


@dataclass(frozen=True)
class Row:
    """The peaks of the card that needs most, in bytes, and of one card that trains alone.

    `floor` is that of the first card, whose shards are the largest where they are not all of a size.
    """

    model: str
    sharding: str
    cards: int
    allocated: int
    floor: int
    reserved: int
    device: int
    least_allocated: int
    alone_allocated: int


def launch(model: str, sharding: str, cards: int, folder: Path) -> tuple[list[dict[str, int]], int]:
    """Peaks of every rank of one optimised recipe, and the floor of the first, in bytes."""
    target = folder / f"{model}-{sharding}-{cards}.json"
    virtual = [sys.executable, "-m", "qlora_lowmem.virtual_gpu", "--card", CARD, "--count", str(cards), "--"]
    if sharding == "FSDP2":
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
        start += ["--num_processes", str(cards), "-m"]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(cards), "-m"]
    job = ["qlora_lowmem.train", "--config", str(RECIPES / "optimised.yaml"), "--model", model, "--device", "cuda"]
    # FSDP2 wants one dtype and 4-bit weights that are stored as floats; the others have the same, to be comparable.
    job += ["--adapter-dtype", "bf16", "--quant-storage", "bf16", "--gradient-accumulation-steps", "2"]
    job += ["--output-dir", str(folder / target.stem), "--quiet", "--no-advice", "--json", str(target)]
    done = subprocess.run([*virtual, *start, *job], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads(target.read_text(encoding="utf-8"))
    return content.get("ranks") or [content], content["floor_bytes"]


@pytest.fixture(scope="module")
def rows(on_gpu: bool, results_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    if on_gpu:
        pytest.skip("several cards are virtual here; on real ones, the same launch lines print the same figures")
    virtual_gpu.get_card(CARD)
    folder = tmp_path_factory.mktemp("ranks")
    found: list[Row] = []
    for model, sharding, cards in tqdm(LAUNCHES, desc="launches", unit="launch"):
        ranks, floor = launch(model, sharding, cards, folder)
        assert len(ranks) == cards
        peaks = {
            name: max(rank[f"peak_{name}_bytes"] for rank in ranks) for name in ("allocated", "reserved", "device")
        }
        least = min(rank["peak_allocated_bytes"] for rank in ranks)
        alone = next((row.allocated for row in found if row.model == model), peaks["allocated"])
        found.append(Row(model, sharding, cards, **peaks, floor=floor, least_allocated=least, alone_allocated=alone))
    _write(results_folder, found)
    return found


def _write(folder: Path, rows: list[Row]) -> None:
    record = provenance_record(CARD, "virtual")
    cells = [
        [
            row.model,
            row.sharding,
            str(row.cards),
            gib(row.allocated),
            gib(row.floor),
            times_floor(row.allocated, row.floor),
            *(gib(size) for size in (row.reserved, row.device, row.alone_allocated)),
            f"{row.allocated / row.alone_allocated - 1:+.1%}",
        ]
        for row in rows
    ]
    headers = [
        "model",
        "sharding",
        "cards",
        "allocated GiB",
        "floor GiB",
        "x floor",
        "reserved GiB",
        "on the card GiB",
        "alone GiB",
        "difference",
    ]
    markdown = (
        f"# Several cards: what each needs\n\nThe optimised recipe (r 8, q k v o, 1,024 tokens, checkpointing, fused "
        f"loss), a process a {CARD}; peaks of the card that needs most, beside the plan for one card that trains "
        "alone. FSDP2 gathers the embeddings whole on every card, beside a copy while they come: on two cards that can "
        "cost more than the shards save. Buffers of NCCL itself are not known to a virtual card and not in these "
        f"figures. {FLOOR_TEXT} Under FSDP2 a card's floor has its own shards, and the 4-bit constants whole.\n\n"
        f"{markdown_table(headers, cells)}\n\n{provenance_lines(record)}\n"
    )
    plain = [vars(row) for row in rows]
    write_result(folder, "ranks", {"environment": record, "provenance": "virtual", "cases": plain}, markdown, plain)


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_shared_out(rows: list[Row], model: str) -> None:
    """Copied weights cost as much on every card; shared ones less with each further card; and no rank stands out."""
    found = {(row.sharding, row.cards): row for row in rows if row.model == model}
    alone = found["none", 1].allocated
    assert found["DDP", 2].allocated >= alone
    assert found["FSDP2", 4].allocated < min(found["FSDP2", 2].allocated, alone)
    assert all(row.allocated == row.least_allocated for row in found.values())
    floors = {key: row.floor for key, row in found.items()}
    assert 0 < floors["FSDP2", 4] < floors["FSDP2", 2] < floors["DDP", 2] == floors["none", 1] < alone
