"""The README's figures are those of the committed results."""

import json

from helpers import ROOT
from qlora_lowmem.commands.readme import CARD
from qlora_lowmem.results.kinds.matrix import KIND, readme_table


def test_readme_shows_the_committed_results() -> None:
    """Peaks on the virtual card are exact, so a run of the matrix changes no figure of the table."""
    content = json.loads((ROOT / "results" / CARD / "matrix.json").read_text(encoding="utf-8"))
    assert readme_table(KIND.read(content).cases) in (ROOT / "README.md").read_text(encoding="utf-8"), (
        "run: qlora-lowmem readme"
    )
