"""What the commands work on, small and made once: a model that chats, an architecture, data, a run, a plan."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers import RECIPES, ROOT, TINY_HYBRID
from qlora_lowmem.files import cache_folder
from qlora_lowmem.memory.profile import LiveMemory, write_live
from qlora_lowmem.models.sources import architecture
from tiny_chat import write_tiny_chat

CARD = "rtx-4050-laptop-6gb"
_SAMPLES = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]}
    for n in range(8)
]


@dataclass(frozen=True)
class Command:
    """One command as it is tried.

    Attributes:
        words: what follows `python -m qlora_lowmem`, in a folder that is a copy of what `prepare` makes.
        codes: exit codes of the command left alone.
        light: it takes a second or two, so that streams and disks fail its work, not only its first words.
        ends: False for the watch, which goes on as long as what it watches.
        target: the file that it writes at its end; it was there before, and must be whole whatever befalls the
            command. None for the watch.
        keeps: what it leaves for the same command to go on with: a pattern of paths. Nothing where that is empty.
    """

    words: tuple[str, ...]
    codes: tuple[int, ...] = (0,)
    light: bool = False
    ends: bool = True
    target: str | None = "out.json"
    keeps: str = ""


def _of(text: str, **options: object) -> Command:
    return Command(tuple(text.format(recipes=RECIPES, results=ROOT / "results", card=CARD).split()), **options)  # type: ignore[arg-type]


_TINY = "--config {recipes}/optimised.yaml --model arch --json out.json"
_TRAIN = (
    "train --config {recipes}/demo.yaml --model model --data data.jsonl --max-seq-length 64 --json out.json --quiet"
)
COMMANDS = {
    "train": _of(f"{_TRAIN} --quiet --max-steps 8 --save-steps 1 --output-dir new", keeps="new/checkpoint-*"),
    "train, virtual": _of(f"{_TRAIN} --quiet --max-steps 2 --device virtual --card {{card}}"),
    "explain": _of(f"explain {_TINY} --max-seq-length 64 --svg peak --snapshot peak.pickle"),
    "longest": _of(f"longest {_TINY} --limit 64 --step 64 --table table"),
    "lengths": _of(f"lengths {_TINY} --lengths 64 --table table"),
    "phases": _of(f"phases {_TINY} --max-seq-length 64"),
    "plan": _of(
        "plan --model arch --card {card} --seq 64 --limit 64 --step 64 --json out.json --write mine.yaml --force",
        keeps="cache/plan/*/*.json",
    ),
    "generate": _of("generate --run run --prompt hello --max-new-tokens 4 --json out.json --quiet"),
    "merge": _of("merge --run run --to merged --json out.json --quiet"),
    "bisect": _of(
        "bisect --good good.txt --bad bad.txt --config tiny.yaml --card {card} --overlays overlays --json out.json",
        codes=(2,),  # nothing grew
    ),
    "data check": _of("data check data.jsonl --json out.json", light=True),
    "data convert": _of("data convert data.json made.jsonl --json out.json --force", light=True),
    "watch": _of("watch --output-dir watched --json --interval 0.1", light=True, ends=False, target=None),
    "report": _of("report {results}/reality.json --output page.html", light=True, target="page.html"),
    "readme": _of("readme --results {results} --readme README.md", light=True, target="README.md"),
    "virtual-gpu": _of("virtual-gpu --card {card} --json out.json -- ./program", light=True),
}
# Not in Python, whose own traceback of an interrupt would be the program's and not the command's.
_PROGRAM = """#include <dlfcn.h>
#include <unistd.h>
int main() {
  auto cuda = dlopen("libcuda.so.1", RTLD_NOW);
  reinterpret_cast<int (*)(unsigned)>(dlsym(cuda, "cuInit"))(0);
  sleep(1);
}
"""
BEFORE = '{"from": "before"}\n'  # what is in the targets but README.md
# What a training and a plan that were left alone came to, for those that were not: folders of what `prepare` makes.
RUN, PLAN = "run", "planned"


def prepare(folder: Path) -> None:
    """Make `folder`, which each trial starts with a copy of."""
    folder.mkdir()
    write_tiny_chat(folder / "model")
    (folder / "arch").mkdir()
    (folder / "arch" / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | TINY_HYBRID))
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in _SAMPLES))
    (folder / "data.json").write_text(json.dumps(_SAMPLES))
    shutil.copy(ROOT / "README.md", folder)
    (folder / "program.cpp").write_text(_PROGRAM)
    subprocess.run(["g++", "program.cpp", "-o", "program", "-ldl"], cwd=folder, check=True)
    tiny = (RECIPES / "optimised.yaml").read_text() + "\n"
    (folder / "tiny.yaml").write_text(tiny.replace("ibm-granite/granite-4.0-h-1b", str(folder / "arch")))
    for version, name in ((1, "good"), (2, "bad")):
        (folder / f"{name}.txt").write_text(f"nothing-at-all=={version}\n")
        (folder / "overlays" / f"nothing-at-all-{version}" / "site-packages").mkdir(parents=True)
    shutil.copytree(cache_folder("virtual_gpu"), folder / "cache" / "virtual_gpu")
    _run(folder, "train", "--output-dir", RUN)
    (folder / "out.json").rename(folder / RUN / "out.json")
    _run(folder, "plan")
    (folder / PLAN).mkdir()
    (folder / "out.json").rename(folder / PLAN / "out.json")
    (folder / "cache" / "plan").rename(folder / PLAN / "cache")
    (folder / "mine.yaml").unlink()
    for name in ("out.json", "page.html"):
        (folder / name).write_text(BEFORE)
    (folder / "watched").mkdir()
    started = psutil.Process().create_time()
    write_live(folder / "watched", LiveMemory(os.getpid(), started, started, "mine", "cpu", phase="training"))


def _run(folder: Path, name: str, *more: str) -> None:
    command = [sys.executable, "-m", "qlora_lowmem", *COMMANDS[name].words, *more]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def environment(folder: Path) -> dict[str, str]:
    """Of a command that works in `folder`, caches in `cache` there and has its temporary files in `tmp`."""
    env = os.environ | {"QLORA_LOWMEM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    if (folder / "tmp").is_dir():
        env["TMPDIR"] = str(folder / "tmp")
    return env | {"OMP_WAIT_POLICY": "passive"}
