"""A file of 5 GB streams: checked, tokenised and trained from in the memory that a file of 50 MB takes.

The whole command on a tiny model, in a process of its own each time, on a CPU. Needs 12 GB of room in the temporary
folder (the file, and its tokens in the output folder) and about half an hour; both are removed at the end.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from matrix_recipes import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result
from qlora_lowmem.units import MIB

pytestmark = pytest.mark.data_stream

SIZES = (50 * 10**6, 5 * 10**9)
# What may differ: three hundred times as many record batches are 2 KiB each, and pages of the memory-mapped file that
# were touched count as resident.
TOLERANCE = 64 * MIB
LINE_BYTES = 2000
_PRIMES = (1, 3, 5, 7, 11, 17, 19, 21, 23, 25, 9, 15)
WORDS = ["".join(chr(97 + (number * prime) % 26) for prime in _PRIMES) for number in range(26)]


def write_model(folder: Path) -> None:
    """One Llama layer of width 16 over a vocabulary of a few words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


def write_data(path: Path, size: int) -> int:
    """Distinct lines of about 2 KB until `size` bytes are full; returns how many."""
    text = " ".join(WORDS[number % len(WORDS)] for number in range(200))
    text = text[: LINE_BYTES - len('{"text": "000000000000 "}\n')]
    count = size // LINE_BYTES
    with path.open("w", encoding="utf-8") as file:
        for number in tqdm(range(count), desc=f"writing {size / 10**9:g} GB", unit="line", delay=2):
            file.write(f'{{"text": "{number:>12} {text}"}}\n')
    return count


def run(folder: Path, data: Path) -> dict[str, Any]:
    """Train one step on all of `data`'s tokens; the summary, with the process's highest resident memory."""
    command = [sys.executable, "-m", "qlora_lowmem.train", "--config", str(RECIPES / "demo.yaml")]
    command += ["--model", str(folder / "model"), "--no-load-in-4bit", "--data", str(data), "--max-seq-length", "512"]
    # The smallest part of an epoch is one step, and an epoch's steps are of all samples.
    command += ["--max-steps", "none", "--num-epochs", "0.0000001", "--output-dir", str(folder / "out"), "--json", "-"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with (folder / "summary.json").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, env=env)
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = content["data"]["tokens"]
    return {
        "file_bytes": data.stat().st_size,
        "samples": found["samples"],
        "tokens": found["tokens"],
        "steps": content["steps"],
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def test_five_gigabytes_in_the_memory_of_fifty_megabytes(tmp_path: Path, results_folder: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    rows = []
    for size in SIZES:
        data = tmp_path / "data.jsonl"
        count = write_data(data, size)
        try:
            rows.append(run(tmp_path, data))
        finally:
            data.unlink()
        assert (rows[-1]["samples"], rows[-1]["steps"]) == (count, 1)
        assert rows[-1]["file_bytes"] == size
        for left in (tmp_path / "out").rglob("*"):
            assert left.stat().st_size < MIB, "the tokens are removed when the run is complete"
        (tmp_path / "out").rename(tmp_path / f"out-{size}")
    record = provenance_record("cpu", "measured")
    cells = [
        [f"{row['file_bytes'] / 10**9:g} GB", f"{row['samples']:,}", f"{row['tokens']:,}",
         f"{row['peak_resident_bytes'] / MIB:.0f}", f"{row['cpu_seconds']:,.0f}", f"{row['seconds']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    headers = ["file", "samples", "tokens", "peak resident MiB", "CPU seconds", "seconds"]
    markdown = (
        "# A file streams\n\nThe whole `train` command on a tiny model and a CPU, one process a row: every line is "
        "checked, every sample tokenised to disk, one step trained from there. Resident memory is a process's highest, "
        f"most of it PyTorch and its libraries.\n\n{markdown_table(headers, cells)}\n\n{provenance_lines(record)}\n"
    )
    write_result(results_folder, "data-stream", {"environment": record, "cases": rows}, markdown, rows)
    small, large = (row["peak_resident_bytes"] for row in rows)
    assert large < small + TOLERANCE, rows
