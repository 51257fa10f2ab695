"""Every operator that PyTorch's own tests have samples of, on a virtual card: it runs, or is refused by name.

What runs gives outputs of the sizes that the CPU gives, but for those whose size depends on values: DATA_DEPENDENT.
"""

import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_page, markdown_table, write_result

pytestmark = pytest.mark.operators
CARD = "rtx-4090-24gb"

# Sizes that the values decide: the worst case, or that of zeros (virtual_gpu/values.toml).
DATA_DEPENDENT = {
    "__getitem__": "a mask: the worst case",
    "argwhere": "the worst case",
    "bincount": "that of zeros",
    "masked_select": "the worst case",
    "nn.functional.one_hot": "that of zeros",
    "nonzero": "the worst case",
    "unique": "the worst case",
    "unique_consecutive": "the worst case",
}
# What the CUDA build of PyTorch does itself, with what it then says: no value and no library has a part in it.
_NO_KERNEL = ("no kernel for CUDA", "Could not run")
_ONLY_GELS = ("on CUDA only the driver gels", "other than `gels` is not supported on CUDA")
_NONE = ("a batch of no matrices fails", "must match the size of tensor b (0)")
_SAVED = ("saved statistics in evaluation: empty on a CPU, not on a card", "")
OF_PYTORCH = {
    "_native_batch_norm_legit": _SAVED,
    "native_batch_norm": _SAVED,
    "histogram": _NO_KERNEL,
    "histogramdd": _NO_KERNEL,
    "linalg.eig": _NONE,
    "linalg.eigvals": _NONE,
    "linalg.lstsq": _ONLY_GELS,
    "linalg.lstsq.grad_oriented": _ONLY_GELS,
    "sparse.mm.reduce": _NO_KERNEL,
    "tensor_split": ("indices belong on the host", "to be on cpu"),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": _NO_KERNEL,
}
REFUSED = {"mode": "NotImplementedError: torch.mode of more than 2,048 values a row"}


@dataclass(frozen=True)
class Row:
    """An operator: how many samples ran on the CPU, and what came of them on the card."""

    operator: str
    dtype: str
    samples: int
    outcome: str
    remark: str = ""


@pytest.fixture(scope="module")
def rows(results_folder: Path) -> list[Row]:
    card = virtual_gpu.get_card(CARD)
    with virtual_gpu.Server(["torch", "operator_samples:load"], max_workers=2) as server:
        names = server.submit("operator_samples:names", {}, card).result().value
        runs = {
            name: server.submit("operator_samples:try_operator", {"name": name}, card, timeout=300) for name in names
        }
        found = [_row(name, run) for name, run in runs.items()]
    _write(results_folder, found)
    return found


def test_every_operator_runs_or_is_refused_by_name(rows: list[Row]) -> None:
    wrong = [row for row in rows if row.outcome in ("fails", "other sizes", "dies")]
    assert not wrong, json.dumps([asdict(row) for row in wrong], indent=1)
    assert len(rows) > 600


def _row(name: str, run: "Future[virtual_gpu.JobResult]") -> Row:
    job = run.result()
    if job.value is None:
        return Row(name, "", 0, "dies", job.error or f"exit code {job.exit_code}")
    found = job.value
    outcome, remark = "runs", ""
    if not found["samples"]:
        outcome, remark = "not tried", "its samples do not run on a CPU"
    elif name in OF_PYTORCH and all(OF_PYTORCH[name][1] in said for said in found["failed"]):
        outcome, remark = "as on a card", OF_PYTORCH[name][0]
    elif found["failed"]:
        refused = name in REFUSED and all(said.startswith(REFUSED[name]) for said in found["failed"])
        outcome, remark = ("refused" if refused else "fails"), found["failed"][0]
    elif found["differ"]:
        outcome = "runs, a size of its own" if name in DATA_DEPENDENT else "other sizes"
        remark = DATA_DEPENDENT.get(name) or str(found["differ"][0])
    return Row(name, found["dtype"], found["samples"], outcome, remark)


def _write(folder: Path, rows: list[Row]) -> None:
    record = provenance_record(CARD, "virtual", None)
    counts = Counter(row.outcome for row in rows)
    summary = markdown_table(["what came of it", "operators"], [[name, str(n)] for name, n in counts.most_common()])
    other = [[row.operator, row.outcome, row.remark.splitlines()[0]] for row in rows if row.outcome != "runs"]
    text = (
        f"The {len(rows)} operators of PyTorch's own tests, each on up to 24 of its small valid samples: first on the "
        "CPU, then on the virtual card, where outputs must have the same shapes and types."
    )
    table = markdown_table(["operator", "what came of it", "why"], other, text_columns=3)
    page = markdown_page("Operators on a virtual card", [text, summary, table], record)
    content = {"environment": record, "operators": [asdict(row) for row in rows]}
    write_result(folder, "operators", content, page, [asdict(row) for row in rows])
