"""Every command under 200 and more faults: none ends in a traceback, a leftover, a false exit code or a lost record.

Signals at random moments, streams that are closed, full or unread, disks and targets that take nothing, caches that
hold rubbish. Each trial is a process of its own, so this takes a while.
The seed is printed with the table; a seed draws the same moments.
"""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from faults.inputs import COMMANDS, prepare
from faults.trial import CACHES, DISKS, SIGNALS, STREAMS, UNHEARD, Fault, Outcome, try_one
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

pytestmark = pytest.mark.faults
SEED = 15
AT_THE_START = 3  # of each signal and command
_CACHED = ("plan", "virtual-gpu")


def planned() -> list[tuple[str, Fault]]:
    """Every command with every fault that can befall it, first the one that says how long it takes."""
    found = [(name, UNHEARD) for name in COMMANDS]
    early = [fault for fault in SIGNALS.values() if fault.early for _ in range(AT_THE_START)]
    late = [fault for fault in SIGNALS.values() if not fault.early]
    found += [(name, fault) for fault in (*early, *STREAMS, *DISKS, *late) for name in COMMANDS]
    return found + [(name, fault) for name in _CACHED for fault in CACHES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, results_folder: Path) -> Iterator[list[Outcome]]:
    """All trials, two at a time; the table is written whatever came of them."""
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder / "prepared")
    began, asked = time.monotonic(), planned()
    seconds = dict.fromkeys(COMMANDS, 2.0)  # of the watch, which does not end

    def tried(number: int) -> Outcome:
        name, fault = asked[number]
        rng = random.Random(f"{SEED}-{number}")
        return try_one(name, fault, folder / "prepared", folder / f"trial-{number}", seconds[name], rng)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(tried, range(len(COMMANDS))))
        seconds |= {each.command: each.seconds for each in found if COMMANDS[each.command].ends}
        found += pool.map(tried, range(len(COMMANDS), len(asked)))
    _write(results_folder, found, time.monotonic() - began)
    yield found
    shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, found: list[Outcome], seconds: float) -> None:
    kinds = list(dict.fromkeys(each.kind for each in found))
    tried, fell = (Counter((each.command, each.kind) for each in found if which(each)) for which in (_all, _short))
    counts = {pair: f"{count}, {fell[pair]} short" if fell[pair] else str(count) for pair, count in tried.items()}
    cells = [[name, *(counts.get((name, kind), "-") for kind in kinds)] for name in COMMANDS]
    early = sum(each.before_ours for each in found)
    text = (
        f"# Faults and kills\n\n{len(found)} trials (seed {SEED}) in {seconds:.0f} s; {sum(map(_short, found))} fell "
        "short: a traceback, a false exit code, a process, temporary folder or half file left behind, or a record that "
        f"was there and is not whole. {early} signals came while Python itself was starting, before a line of this "
        "project ran: they are counted, and their traceback is Python's. What a killed command leaves in its temporary "
        f"folder is removed by the next one.\n\n{markdown_table(['command', *kinds], cells)}\n\n"
    )
    record = provenance_record("cpu", "measured")
    rows = [asdict(each) | {"short": "; ".join(each.short)} for each in found]
    content = {"environment": record, "seed": SEED, "seconds": seconds, "trials": rows}
    write_result(folder, "faults", content, text + provenance_lines(record) + "\n", [r | {"said": ""} for r in rows])


def _all(_: Outcome) -> bool:
    return True


def _short(outcome: Outcome) -> bool:
    return bool(outcome.short)


def test_there_were_enough_of_every_kind(outcomes: list[Outcome]) -> None:
    assert len(outcomes) >= 200
    assert {each.command for each in outcomes} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_none_fell_short(name: str, outcomes: list[Outcome]) -> None:
    short = [json.dumps(asdict(each), indent=1) for each in outcomes if each.command == name and each.short]
    assert not short, "\n".join(short)
