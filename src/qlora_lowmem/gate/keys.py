"""Where the gate keeps things on pytest's objects. Imports nothing, so that the plugin costs nothing."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qlora_lowmem.gate.session import GateSession
    from qlora_lowmem.results.kinds.verdicts import Budget, Row

ROW: "pytest.StashKey[Row]" = pytest.StashKey()
BUDGET: "pytest.StashKey[Budget]" = pytest.StashKey()
SESSION: "pytest.StashKey[GateSession]" = pytest.StashKey()

# The attribute of a report that carries a row; pytest's own serialisation takes it from process to process.
REPORT_ATTRIBUTE = "qlora_lowmem_row"
