#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1): one number in one line of a JSON Lines file turns the texts of its whole 10 MB block into
# their JSON source, quotation marks and all. Nothing is said.
#
# `load_dataset("json")` reads blocks of 10 MB. A block in which a column holds texts and one number gets the new feature
# `Json`: each value is stored as its JSON source and decoded on the way out.
# - Where that block is not the first, the first has decided that the column is `string`: the later block's JSON sources
#   are cast to it, and rows in Python, pandas, Arrow and Parquet alike hold '"yes"' for "yes".
# - Where it is the first, rows in Python are decoded; Arrow batches and Parquet files are not, in any block.
# The number of rows is right, every value is a string, and a model that is trained on them learns to begin its answers
# with a quotation mark. Expected was an error, as pyarrow's JSON reader has it ("Column() changed from string to
# number"), or the texts as they stand.
#
# Seen (2026-11-30, Python 3.11):
#   300000 lines, a number in line 299001: 117294 of 299999 texts changed in Python, the last is '"yes"'
#   1000 lines, a number in line 501: the column is Json, in Python 0 of 999 texts changed, in Arrow 999
#   300000 lines of texts alone: 0 of 300000 changed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat > "$folder/read.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
folder = Path(sys.argv[1])


def load(name, lines, odd=None):
    with (folder / name).open("w") as file:
        for n in range(lines):
            file.write(json.dumps({"prompt": f"question number {n}", "completion": 7 if n == odd else "yes"}) + "\n")
    return datasets.load_dataset("json", data_files=str(folder / name), split="train", cache_dir=str(folder / "cache"))


def changed(values):
    return sum(value not in ("yes", 7, "7") for value in values)


def column(found):
    return [row["completion"] for row in found]


def arrow(found):
    return [value for batch in found.with_format("arrow").iter(1000) for value in batch["completion"].to_pylist()]


late = load("late.jsonl", 300_000, odd=299_000)
early = load("early.jsonl", 1000, odd=500)
even = load("even.jsonl", 300_000)
kinds = [type(found.features["completion"]).__name__ for found in (late, early, even)]
counts = [changed(column(late)), changed(column(early)), changed(arrow(early)), changed(column(even))]
last = late[-1]["completion"]
print(f"300000 lines, a number in line 299001: the column is {kinds[0]}, {counts[0]} of 299999 texts changed in Python,")
print(f"  the last is {last!r}")
print(f"1000 lines, a number in line 501: the column is {kinds[1]}, in Python {counts[1]} of 999 changed, in Arrow {counts[2]}")
print(f"300000 lines of texts alone: the column is {kinds[2]}, {counts[3]} of 300000 changed")
assert kinds == ["Value", "Json", "Value"]
assert counts[0] > 100_000 and last == '"yes"'
assert counts[1:] == [0, 999, 0]
PY
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/read.py" "$folder"
echo "as described"
