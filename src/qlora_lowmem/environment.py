"""Where a figure comes from: versions, device, commit, command, date. Imports no torch."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

SCRIPT = "qlora-lowmem"
_PACKAGE = "qlora_lowmem"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "triton", "fla-core")


def versions() -> dict[str, str]:
    """Versions that a recorded peak depends on; torch's with its CUDA build (`2.14.1+cu130`)."""
    found = {"qlora_lowmem": installed(SCRIPT)} | {package: installed(package) for package in PACKAGES}
    found["torch"] = _torch_version() or found["torch"]
    known = {package: version or "not installed" for package, version in found.items()}
    return {"python": platform.python_version()} | known


def _torch_version() -> str | None:
    """torch's full version with its build tag, read from its files; None where torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"__version__ = '([^']+)'", text)
    return match.group(1) if match else None


def commit() -> str:
    """The commit of the checkout that this package runs from, `+changes` if it differs; `unknown` outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", ":/src", ":/bench")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def command() -> str:
    """The command that runs, as it was typed: `qlora-lowmem train ...`, `python -m qlora_lowmem.train ...`."""
    return " ".join([_program(), *map(shlex.quote, sys.argv[1:])])


def _program() -> str:
    program, package = Path(sys.argv[0]), Path(__file__).parent
    if program.suffix == ".py" and program.is_relative_to(package):
        parts = program.relative_to(package.parent).with_suffix("").parts
        return "python -m " + ".".join(part for part in parts if part != "__main__")
    return f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name


def typed(name: str = "") -> str:
    """How one types the package's command `name` in the way in which this process was called; without it, the script.

    That is `qlora-lowmem NAME` or `python -m qlora_lowmem NAME` where one of these two was, `python -m
    qlora_lowmem.NAME` in any other program.
    """
    called = _program()
    if called == f"python -m {_PACKAGE}" or called == SCRIPT:
        return f"{called} {name}".rstrip()
    return f"python -m {_PACKAGE}.{name}" if name else SCRIPT


def words_of(name: str) -> list[str]:
    """The first words of a new process that runs the package's command `name`, as `typed` has it."""
    first, *rest = typed(name).split()
    return [sys.executable, *([sys.argv[0]] if first == SCRIPT else []), *rest]


def share_cores(device: str) -> None:
    """Let OpenMP's threads sleep while they wait, where this process computes on a CPU and nobody said otherwise.

    Threads that spin take the cores from other work and from each other: beside a busy process, a step took 250 s, and
    19 s like this. OpenMP reads it as torch is imported, so it must be said before.
    """
    if device == "cpu":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def provenance_record(device: str, provenance: str, driver: str | None = None) -> dict[str, object]:
    """All that a table needs to be believed or repeated, as plain data.

    Args:
        provenance: `virtual` or `measured`.
        driver: the GPU driver's version; None where none was involved.
    """
    return {
        "device": device,
        "provenance": provenance,
        "driver": driver or "none",
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def installed(distribution: str) -> str | None:
    """The version of a package in this environment; None if it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def rank() -> int:
    """This process' number among all; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes() -> int:
    """How many there are on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0
