"""Which package made a recipe need more: bisects between two environments, one package at a time.

    qlora-lowmem bisect --good constraints-a.txt --bad constraints-b.txt --config RECIPE

Every step is a run on a virtual card in an environment of its own, made of overlays: nothing that is installed changes.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qlora_lowmem.children import run_child
from qlora_lowmem.commands.frame import add_json_argument, write_json
from qlora_lowmem.environment import installed, words_of
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.files import cache_folder, read_text, whole_folder
from qlora_lowmem.recipe import SYNTHETIC
from qlora_lowmem.recipe.io import lasting_path, load_recipe
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.scratch import scratch_folder
from qlora_lowmem.targets import check_folder
from qlora_lowmem.units import format_bytes, format_signed

_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*([^\s;#]+)")

# Allocated bytes in an environment of these versions; None where the recipe does not run in it.
Measure = Callable[[Mapping[str, str]], int | None]


@dataclass(frozen=True)
class Step:
    """One environment that was tried: the packages of the bad versions, and the peak; None if it did not run."""

    changed: tuple[str, ...]
    allocated: int | None


@dataclass(frozen=True)
class Found:
    """What a bisection came to.

    Attributes:
        packages: the package that did it; more than one where environments between them do not run.
        versions: of those: (good, bad).
        good, bad: allocated bytes at both ends.
        jump: bytes that the step across `packages` added.
        steps: what was tried, in order.
    """

    packages: tuple[str, ...]
    versions: Mapping[str, tuple[str, str]]
    good: int
    bad: int
    jump: int
    steps: tuple[Step, ...]

    def render(self) -> str:
        """For a terminal."""
        named = " or ".join(f"{name} {self.versions[name][0]} -> {self.versions[name][1]}" for name in self.packages)
        lines = [
            f"{named}: {format_signed(self.jump)} ({self.jump:+,} bytes)",
            f"good {format_bytes(self.good)}, bad {format_bytes(self.bad)}, "
            f"difference {format_signed(self.bad - self.good)}; {len(self.steps)} environments tried",
        ]
        if self.jump != self.bad - self.good:
            rest = self.bad - self.good - self.jump
            lines.append(f"the other {format_signed(rest)} come from other packages: bisect again without this one")
        if len(self.packages) > 1:
            lines.append("the environments between them do not run, so it is one of these, or both together")
        return "\n".join(lines)


def bisect(good: Mapping[str, str], bad: Mapping[str, str], measure: Measure) -> Found:
    """Find the package whose change makes the step from the good peak towards the bad one.

    Packages change one after the other in alphabetical order, and the first environment past half of the growth is
    looked for by halving. An environment that does not run is stepped around, as `git bisect skip` does.

    Raises:
        UsageError: nothing differs, an end does not run, or the bad end needs no more than the good one.
    """
    names = sorted(name for name in good.keys() & bad.keys() if good[name] != bad[name])
    if not names:
        raise UsageError("--good and --bad pin the same versions of everything that both pin: nothing to bisect")
    steps: list[Step] = []

    @cache
    def peak_with(count: int) -> int | None:
        changed = tuple(names[:count])
        peak = measure({name: (bad if name in changed else good)[name] for name in names})
        steps.append(Step(changed, peak))
        return peak

    first, last = peak_with(0), peak_with(len(names))
    if first is None or last is None:
        end = "--good" if first is None else "--bad"
        raise UsageError(f"{end}: the recipe does not run in that environment; see the message above")
    if last <= first:
        raise UsageError(
            f"--bad needs no more than --good: {format_bytes(last)} against {format_bytes(first)}. Swap them, or give "
            "the versions between which the recipe grew"
        )
    threshold = first + (last - first) / 2
    low, high, low_peak, high_peak = 0, len(names), first, last
    while high - low > 1:
        middle = _nearest_that_runs(low, high, peak_with)
        if middle is None:
            break
        found = peak_with(middle)
        assert found is not None
        if found > threshold:
            high, high_peak = middle, found
        else:
            low, low_peak = middle, found
    packages = tuple(names[low:high])
    versions = {name: (good[name], bad[name]) for name in packages}
    return Found(packages, versions, first, last, high_peak - low_peak, tuple(steps))


def _nearest_that_runs(low: int, high: int, peak_with: Callable[[int], int | None]) -> int | None:
    """The count nearest to the middle between both ends at which the recipe runs."""
    middle = (low + high) // 2
    nearest = sorted(range(low + 1, high), key=lambda count: (abs(count - middle), count))
    return next((count for count in nearest if peak_with(count) is not None), None)


def measure_recipe(versions: Mapping[str, str], *, config: Path, card: str | None, folder: Path) -> int | None:
    """Allocated bytes of a recipe on a virtual card, in an environment of these versions made of overlays in `folder`.

    None, and the reason on stderr, if the recipe does not run.
    """
    different = {name: version for name, version in versions.items() if installed(name) != version}
    named = ", ".join(f"{name} {version}" for name, version in sorted(different.items())) or "what is installed"
    with scratch_folder() as scratch:
        summary = scratch / "summary.json"
        command = [*words_of("train"), "--config", str(config), "--quiet", *(["--card", card] if card else [])]
        command += ["--device", "virtual", "--data", "synthetic", "--no-advice"]
        command += ["--output-dir", str(scratch / "out"), "--json", str(summary)]
        environment = overlaid(different, folder)
        done = run_child(command, environment)
        content = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    if not content.get("fits"):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        print(f"{named}: does not run: {reason}", file=sys.stderr)
        return None
    peak = int(content["peak_allocated_bytes"])
    print(f"{named}: {format_bytes(peak)}", file=sys.stderr)
    return peak


def read_constraints(path: Path) -> dict[str, str]:
    """Exact versions of a constraints file by normalised package name, comments, options and ranges left out.

    Raises:
        UsageError: it cannot be read, or pins nothing.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise UsageError(
            f"{path}: the constraints cannot be read: {error.strerror}. Give what pip freeze writes (--good, --bad)"
        ) from None
    matches = filter(None, (_PIN.match(line.strip()) for line in lines))
    pins: dict[str, str] = {canonicalize_name(match[1]): match[2] for match in matches}
    if not pins:
        raise UsageError(f"{path}: no line of the form package==version; write the versions with pip freeze")
    return pins


def overlaid(versions: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Environment variables in which Python sees these versions before what is installed.

    An overlay is a folder with one version of one package, and of its dependencies those alone that are not installed
    in a version that it accepts, so torch is not installed again. Overlays are kept, `NAME-VERSION/site-packages` in
    `folder`, and used again.

    Raises:
        UsageError: pip cannot get one of them.
    """
    paths = [str(_overlay(folder, n, v)) for n, v in sorted(versions.items()) if installed(n) != v]
    before = os.environ.get("PYTHONPATH")
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


def _overlay(folder: Path, name: str, version: str) -> Path:
    # `site-packages`, so that lines of code are named as those of installed packages are (`kinds.line_of`).
    target = folder / f"{name}-{version}" / "site-packages"
    if not target.is_dir():
        with whole_folder(target) as scratch:
            wanted = [f"{name}=={version}"]
            while wanted:
                _install(scratch, wanted)
                wanted = _absent(scratch)
    return target


def _install(target: Path, requirements: list[str]) -> None:
    # Not compiled: Python does that for the few of its files that a run imports.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    command += ["--target", str(target), *requirements]
    # The constraints of the environment that runs us name the very versions that others are wanted in place of.
    free = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    with scratch_folder() as temporary:  # where pip that is ended leaves what it has unpacked
        done = run_child(command, free | {"TMPDIR": str(temporary)})
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise UsageError(f"{', '.join(requirements)} cannot be installed: {errors[-1]}")


def _absent(target: Path) -> list[str]:
    """Requirements of what is in `target` that are neither there nor installed in a version that they accept."""
    inside = list(metadata.distributions(path=[str(target)]))
    there = {canonicalize_name(found.name) for found in inside}
    needed = [Requirement(text) for found in inside for text in found.requires or ()]
    absent = {}
    for need in needed:
        name, version = canonicalize_name(need.name), installed(need.name)
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        met = name in there or (version is not None and need.specifier.contains(version, prereleases=True))
        if applies and not met:
            absent[name] = f"{need.name}{need.specifier}"
    return sorted(absent.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--good", metavar="FILE", type=Path, required=True, help="constraints before (pip freeze)")
    parser.add_argument("--bad", metavar="FILE", type=Path, required=True, help="constraints after")
    parser.add_argument("--config", metavar="RECIPE", type=Path, required=True, help="what is measured")
    parser.add_argument("--card", metavar="NAME", help="a virtual card on which it fits (default: the recipe's)")
    parser.add_argument("--overlays", metavar="DIR", help="where packages are kept (default: the cache)")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    check_folder("--overlays", options.overlays)
    folder = cache_folder("overlays") if options.overlays is None else Path(options.overlays)
    good, bad = read_constraints(options.good), read_constraints(options.bad)
    changes = {"device": "virtual", "data": SYNTHETIC} | ({"card": options.card} if options.card else {})
    recipe = load_recipe(options.config, changes)
    inputs_of(recipe)  # refused here, and not in an environment that is made for it
    config = Path(lasting_path(options.config, recipe))
    found = bisect(good, bad, partial(measure_recipe, config=config, card=options.card, folder=folder))
    if options.json != "-":
        print(found.render())
    write_json(options.json, asdict(found))
    return EXIT_OK
