"""Every command under 300 faults: none ends in a traceback, a leftover, a false exit code or a lost record.

Signals at random moments, streams that are closed, full or unread, disks and targets that take nothing, caches that
hold rubbish. What is interrupted once it has something to lose is started again, and must go on with that. Each trial
is a process of its own, so this takes a while. The seed is printed with the table; a seed draws the same moments.
"""

import json
import shutil
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from faults import kinds
from faults.inputs import COMMANDS, prepare
from faults.kinds import Fault
from faults.trial import Outcome, try_one
from faults.verdicts import pythons_own
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result

pytestmark = pytest.mark.faults
SEED = 15
EACH_AT_THE_START, EACH_AGAIN = 3, 2  # of each signal and command
_CACHED = ("plan", "virtual-gpu")


def planned() -> list[tuple[str, Fault]]:
    """Every command with every fault that can befall it, first the one that says how long it takes."""
    found = [(name, kinds.UNHEARD) for name in COMMANDS]
    early = [fault for fault in kinds.AT_THE_START for _ in range(EACH_AT_THE_START)]
    found += [(name, fault) for fault in (*early, *kinds.STREAMS, *kinds.AT_WORK) for name in COMMANDS]
    found += [(name, fault) for fault in kinds.DISKS for name in COMMANDS if COMMANDS[name].target]
    again = [fault for fault in kinds.THEN_AGAIN for _ in range(EACH_AGAIN)]
    found += [(name, fault) for fault in again for name in COMMANDS if COMMANDS[name].keeps]
    return found + [(name, fault) for name in _CACHED for fault in kinds.CACHES]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, results_folder: Path) -> Iterator[list[Outcome]]:
    """All trials, two at a time; the table is written whatever came of them."""
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder / "prepared")
    began, asked = time.monotonic(), planned()
    alone: dict[str, Outcome] = {}

    def tried(number: int) -> Outcome:
        name, fault = asked[number]
        return try_one(name, fault, folder / "prepared", folder / f"trial-{SEED}-{number}", alone.get(name))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(tried, range(len(COMMANDS))))
        alone |= {each.command: each for each in found}
        found += pool.map(tried, range(len(COMMANDS), len(asked)))
    _write(results_folder, found, time.monotonic() - began)
    yield found
    shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, found: list[Outcome], seconds: float) -> None:
    columns = list(dict.fromkeys(each.kind for each in found))
    tried, fell = (Counter((each.command, each.kind) for each in found if which(each)) for which in (_all, _short))
    counts = {pair: f"{count}, {fell[pair]} short" if fell[pair] else str(count) for pair, count in tried.items()}
    cells = [[name, *(counts.get((name, kind), "-") for kind in columns)] for name in COMMANDS]
    early = sum(each.before_ours for each in found)
    text = (
        f"# Faults and kills\n\n{len(found)} trials (seed {SEED}) in {seconds:.0f} s; {sum(map(_short, found))} fell "
        "short: a traceback, a false exit code, a process, temporary folder or half file left behind, or a record that "
        "was there and is not whole. *Then again*: struck once there was a checkpoint or a kept answer, and started "
        "again, a training goes on from its newest checkpoint to the losses, log and adapter (byte for byte) of one "
        "that was left alone, and a plan with every answer that was kept to the same plan; so does a plan whose cache "
        f"holds rubbish. {early} interrupts came while Python itself was starting, before a line of this project ran: "
        "they are counted, and their traceback is Python's. What a killed command leaves in its temporary folder is "
        f"removed by the next one.\n\n{markdown_table(['command', *columns], cells)}\n\n"
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


def test_some_had_something_to_go_on_with(outcomes: list[Outcome]) -> None:
    for name in (name for name in COMMANDS if COMMANDS[name].keeps):
        again = [each for each in outcomes if each.command == name and each.kind.endswith("again")]
        assert any(each.code and each.went_on[0] in "c123456789" for each in again), again


@pytest.mark.parametrize("name", COMMANDS)
def test_none_fell_short(name: str, outcomes: list[Outcome]) -> None:
    short = [json.dumps(asdict(each), indent=1) for each in outcomes if each.command == name and each.short]
    assert not short, "\n".join(short)


_STARTING = (
    'Traceback (most recent call last):\n  File "<frozen runpy>", line 189, in _run_module_as_main\n'
    '  File "<frozen runpy>", line 112, in _get_module_details\n'
)
_ENDS = "KeyboardInterrupt\n"
_WHILE = "During handling of the above exception, another exception occurred:\n\n"
_OURS = '  File "/somewhere/qlora_lowmem/__init__.py", line 3, in <module>\n    import sys\n'
_RUN = '  File "<frozen runpy>", line 88, in _run_code\n'
_LIBRARY = f'  File "{sysconfig.get_path("purelib")}/torch/__init__.py", line 9, in <module>\n'
_SITE = "Fatal Python error: init_import_site: Failed to import the site module\nPython runtime state: initialized\n"


@pytest.mark.parametrize(
    ("said", "code", "own"),
    [
        (_STARTING + _ENDS, -2, True),
        (f'{_STARTING}  File "{sysconfig.get_path("stdlib")}/ast.py", line 5, in <module>\n{_ENDS}', -2, True),
        (f'{_SITE}Traceback (most recent call last):\n  File "<frozen site>", line 9, in main\n{_ENDS}', 1, True),
        (f"{_STARTING}AttributeError: none\n\n{_WHILE}{_STARTING}{_ENDS}", -2, True),
        (f"{_STARTING}{_OURS}AttributeError: none\n\n{_WHILE}{_STARTING}{_ENDS}", -2, False),
        (_STARTING + _ENDS, 1, False),
        (_STARTING + _ENDS, 130, False),
        (_STARTING + _OURS + _ENDS, -2, False),
        (_STARTING + _RUN + _ENDS, -2, False),
        (_STARTING + _LIBRARY + _ENDS, -2, False),
        (_STARTING + "ValueError: bad\n", -2, False),
        (f"{_STARTING}{_ENDS}interrupted\n", -2, False),
        (_STARTING + _ENDS + _STARTING + _ENDS, -2, False),
        ("", -2, False),
    ],
)
def test_only_what_python_says_of_its_own_start_is_not_ours(said: str, code: int, own: bool) -> None:
    assert pythons_own(said, code) is own
