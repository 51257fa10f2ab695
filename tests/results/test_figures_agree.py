"""A figure of one name is one figure, wherever it stands in results, README and docs; or the place says why not."""

import json
import re
from typing import Any

from helpers import ROOT
from qlora_lowmem.results.kinds.phases import CHECKPOINT_TEXT
from qlora_lowmem.results.tables import SHORTENED_TEXT, gib
from results.examples import CARD

RESULTS = ROOT / "results"
TOKEN_OF_A_BATCH_THAT_WAITS = 24  # bytes: id, mask and label
MIB = 2**20


def content(name: str) -> Any:
    return json.loads((RESULTS / CARD / f"{name}.json").read_text(encoding="utf-8"))


def matrix() -> dict[str, dict[str, Any]]:
    return {case["recipe"]: case for case in content("matrix")["cases"]}


def test_runs_of_two_micro_batches_differ_by_the_batches_that_wait() -> None:
    """And by no other MiB: `lengths` and the waterfall beside the matrix."""
    shorter = [(c["recipe"], c["tokens"], c["peak_allocated_bytes"]) for c in content("lengths")["cases"]]
    for step in content("waterfall")["cases"]:
        if name := re.search(r"^baseline(?=:)|(?<=\()(?:optimised|lean)(?=\)$)", step["idea"]):
            shorter.append((name[0], step["tokens"], step["peak_allocated_bytes"]))
    same = [(matrix()[name], allocated) for name, tokens, allocated in shorter if _length(name) == tokens]
    assert len(same) == 5
    for case, allocated in same:
        waiting = (case["gradient_accumulation_steps"] - 2) * case["batch_size"] * case["max_seq_length"]
        difference = case["peak_allocated_bytes"] - allocated
        assert abs(difference - waiting * TOKEN_OF_A_BATCH_THAT_WAITS) < MIB, case["recipe"]
    assert SHORTENED_TEXT in (RESULTS / CARD / "lengths.md").read_text(encoding="utf-8")


def _length(recipe: str) -> int:
    return int(matrix()[recipe]["max_seq_length"])


def test_an_attribution_is_of_the_steady_phase_of_the_matrix() -> None:
    for name in ("baseline", "optimised"):
        found = content(f"attribution-{name}")
        (steady,) = [each for each in matrix()[name]["phases"] if each["name"] == found["attribution"]["phase"]]
        assert found["attribution"]["allocated_bytes"] == steady["allocated"]
        assert found["recipe"]["batch"]["max_seq_length"] == _length(name)
        assert found["floor_bytes"] == matrix()[name]["floor_bytes"]


def test_a_life_from_a_checkpoint_says_why_it_takes_less() -> None:
    """1.473 beside 1.482, by what the allocator rounds."""
    for case in content("phases")["cases"]:
        if case["phase"] == "steady":
            row = matrix()[case["recipe"]]
            assert 0 < row["peak_allocated_bytes"] - case["allocated_bytes"] < 16 * MIB
            assert row["floor_bytes"] == case["floor_bytes"]
    assert CHECKPOINT_TEXT in (RESULTS / CARD / "phases.md").read_text(encoding="utf-8")


def test_the_longest_of_a_changed_recipe_has_another_name() -> None:
    """5,120 tokens with adapters on all linear layers; 6,400 of `optimised` itself, which `plan` says."""
    assert content("longest")["changes"]
    rows = re.findall(r"^\| (optimised|lean)(.*?) *\|", (RESULTS / CARD / "longest.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    assert all("with target_modules all-linear" in changed for _, changed in rows)


def test_what_a_plan_and_a_watch_show_is_the_matrix() -> None:
    row = matrix()["optimised"]
    allocated, reserved, device = (gib(row[f"peak_{figure}_bytes"]) for figure in ("allocated", "reserved", "device"))
    assert f"Needs {device} GiB of 5.500 usable" in (RESULTS / "newcomer.md").read_text(encoding="utf-8")
    assert f"({allocated} allocated, {reserved} reserved)" in (RESULTS / "newcomer.md").read_text(encoding="utf-8")
    assert f"{allocated} GiB allocated, {reserved} GiB reserved" in (ROOT / "docs/watch.md").read_text(encoding="utf-8")
