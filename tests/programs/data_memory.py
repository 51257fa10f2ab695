"""The memory that reading data takes: `data_memory.py FILE [TOKENIZER_FOLDER]` checks a file and may tokenise it.

Prints the KiB by which the process's highest resident memory grew, the samples and the duplicates.
"""

import re
import sys
import tempfile
from pathlib import Path

from qlora_lowmem.data import check_data
from qlora_lowmem.data.report import DuplicateCounter


def peak() -> int:
    """VmHWM of this process in KiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1])


# What is imported on first use is not the data's memory.
with tempfile.TemporaryFile() as scratch:
    warm = DuplicateCounter(scratch)
    warm.add(1, b"")
    warm.count()
if sys.argv[1].endswith(".parquet"):
    import pyarrow.parquet  # noqa: F401
if len(sys.argv) == 2:
    before = peak()
    checked = check_data(sys.argv[1])
else:
    from transformers import AutoTokenizer

    from helpers import RECIPES
    from qlora_lowmem.recipe.io import load_recipe
    from qlora_lowmem.tokens.dataset import training_data

    recipe = load_recipe(RECIPES / "demo.yaml", {"max_steps": None, "max_seq_length": 512})
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    tokenizer("warm")
    checked = check_data(sys.argv[1])
    before = peak()
    data = training_data(recipe, checked, tokenizer, None)
    assert len(data.dataset[len(data.dataset) - 1]["input_ids"]) > 1
print(peak() - before, checked.report.samples, checked.report.duplicates.count)
