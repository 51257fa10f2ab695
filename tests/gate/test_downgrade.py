"""A real downgrade: transformers 5.17, whose Mamba-2 scan holds a (chunk, chunk, heads, state) tensor.

Needs a package index for the older version, which lands in the cache as an overlay; nothing installed changes.
"""

import json
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from gate.examples import grown
from gate.seeds import MODEL
from helpers import RECIPES
from qlora_lowmem.commands.bisect import bisect, measure_recipe, overlaid
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import cache_folder
from qlora_lowmem.gate.records import attributed, key_of
from qlora_lowmem.gate.verdicts import EXACT, compare
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.models.sources import architecture
from qlora_lowmem.results.kinds.verdicts import Record

pytestmark = pytest.mark.slow

OLD = "5.17.0"


@pytest.fixture(scope="module")
def overlays() -> Path:
    folder = cache_folder("overlays")
    try:
        overlaid({"transformers": OLD}, folder)
    except UsageError as error:
        pytest.skip(f"no package index: {error}")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The optimised recipe on four layers, without checkpointing: the scan's tensors are kept."""
    folder = tmp_path_factory.mktemp("small-hybrid")
    (folder / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | MODEL))
    text = (RECIPES / "optimised.yaml").read_text(encoding="utf-8")
    changes = {"  model:": str(folder), "  weights:": "random", "  max_seq_length:": "256"}
    changes |= {"  gradient_accumulation_steps:": "2", "  gradient_checkpointing:": "false"}
    lines = []
    for line in text.splitlines():
        field = next((name for name in changes if line.startswith(name)), None)
        lines.append(f"{field} {changes[field]}" if field else line)
    path = folder / "small.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def explained(recipe: Path, environment: dict[str, str]) -> Record:
    """The record of a run of `explain` in an environment."""
    command = [
        sys.executable,
        "-m",
        "qlora_lowmem.explain",
        "--config",
        str(recipe),
        "--device",
        "virtual",
        "--json",
        "-",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    found, versions = msgspec.convert(content["attribution"], Attribution), content["environment"]["versions"]
    key = key_of(found.device, found.provenance, "expandable_segments:False", versions, content["recipe_hash"])
    peak = sum(size for kind, size in found.kinds.items() if kind not in ("slack", "outside"))
    return attributed(Record(key, peak, 0, 0, versions=versions), found)


def test_it_is_caught_and_attributed_to_the_scan(recipe: Path, overlays: Path) -> None:
    before, after = (explained(recipe, overlaid(pins, overlays)) for pins in ({}, {"transformers": OLD}))
    assert compare("downgrade", before, after, EXACT).name == "NOT COMPARABLE", "the key has the version"
    verdict = compare("downgrade", before, after, EXACT, across_versions=True)
    assert verdict.name == "REGRESSED"
    assert next(iter(grown(before, after))) in ("activations_mamba", "backward_mamba"), verdict.render()
    assert f"transformers {metadata.version('transformers')} -> {OLD}" in verdict.render()


def test_the_bisection_names_it(recipe: Path, overlays: Path) -> None:
    """Among packages that changed with it, one of which has no effect."""
    now = {name: metadata.version(name) for name in ("tabulate", "transformers")}
    measure = partial(measure_recipe, config=recipe, card=None, folder=overlays)
    found = bisect(now, now | {"tabulate": "0.9.0", "transformers": OLD}, measure)
    assert found.packages == ("transformers",)
    assert found.jump > 0
