"""The published rows, and how a virtual peak is held against them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
HERE = Path(__file__).parent

# Names of GPUs in the published data that the table of cards spells otherwise.
_CARDS = {
    "rtx-3090": "rtx-3090-24gb",
    "rtx-4090": "rtx-4090-24gb",
    "b200": "b200-180gb",
    "h100-pcie": "h100-80gb",
}
EXCEPTED = {
    "rope/huggingface": "its outer product ran through cuBLAS in the measured PyTorch (2.4) and is a Triton kernel in "
    "today's: no workspace, and what follows lies elsewhere"
}


@dataclass(frozen=True)
class PublishedRow:
    """A peak of one operation that others measured on a real card."""

    case: str
    x: int
    gpu: str
    mode: str
    config: Mapping[str, Any]
    kind: str
    measured_mib: float
    source: str
    note: str

    @property
    def name(self) -> str:
        """What tells the row from every other."""
        dtype = str(self.config.get("dtype", "")).removeprefix("torch.")
        swept = self.config["x_name"]
        return "-".join(filter(None, (self.case, self.gpu, self.mode, dtype, f"{swept}{self.x}")))

    @property
    def card(self) -> str:
        """The row's card in the table of cards."""
        return _CARDS.get(self.gpu, self.gpu)

    @property
    def series(self) -> tuple[str, ...]:
        """Equal for the rows of one sweep."""
        return (self.case, self.gpu, self.mode, json.dumps(self.config, sort_keys=True))


@dataclass(frozen=True)
class Score:
    """A virtual peak beside the published one.

    Attributes:
        error: virtual over measured, less 1; None for the row that differences are taken to.
        compared: what was held against what.
        held: whether the limit applies.
    """

    row: PublishedRow
    virtual_bytes: int
    error: float | None
    compared: str
    held: bool


@dataclass(frozen=True)
class FineTuningRun:
    """A whole run's reserved peak that others measured on a real card."""

    experiment: str
    card: str
    torch: str
    transformers: str
    trainable_parameters: int
    reserved_mib: float
    peft_config: Mapping[str, Any]
    source: str


def published_rows() -> list[PublishedRow]:
    """Every row of `measured.csv`."""
    return [
        PublishedRow(
            case=line["case"],
            x=int(line["x"]),
            gpu=line["gpu"],
            mode=line["mode"],
            config=json.loads(line["config"]),
            kind=line["kind"],
            measured_mib=float(line["measured_mib"]),
            source=line["source"],
            note=line["note"],
        )
        for line in _lines("measured.csv")
    ]


def fine_tuning_runs() -> list[FineTuningRun]:
    """Every row of `finetuning.csv`."""
    return [
        FineTuningRun(
            experiment=line["experiment"],
            card=line["card"],
            torch=line["torch"],
            transformers=line["transformers"],
            trainable_parameters=int(line["trainable_params"]),
            reserved_mib=float(line["reserved_max_mib"]),
            peft_config=json.loads(line["peft_config"]),
            source=line["source"],
        )
        for line in _lines("finetuning.csv")
    ]


def _lines(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def score(rows: Sequence[PublishedRow], virtual_bytes: Mapping[str, int]) -> list[Score]:
    """Hold each virtual peak (by the row's name) against its row: the peak itself, or its growth over the sweep.

    A row that has no virtual peak is left out.
    """
    first: dict[tuple[str, ...], PublishedRow] = {}
    for row in rows:
        if row.kind == "difference" and (row.series not in first or row.x < first[row.series].x):
            first[row.series] = row
    return [_score(row, first.get(row.series), virtual_bytes) for row in rows if row.name in virtual_bytes]


def _score(row: PublishedRow, first: PublishedRow | None, virtual_bytes: Mapping[str, int]) -> Score:
    virtual = virtual_bytes[row.name]
    if row.case in EXCEPTED:
        return Score(row, virtual, virtual / MIB / row.measured_mib - 1, f"excepted: {EXCEPTED[row.case]}", held=False)
    if first is None:
        return Score(row, virtual, virtual / MIB / row.measured_mib - 1, "the peak", held=True)
    if row is first:
        return Score(row, virtual, None, "what the others' growth is taken from", held=False)
    measured_growth = row.measured_mib - first.measured_mib
    virtual_growth = (virtual - virtual_bytes[first.name]) / MIB
    return Score(row, virtual, virtual_growth / measured_growth - 1, f"growth since x = {first.x}", held=True)
