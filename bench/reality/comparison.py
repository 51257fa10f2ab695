"""A published figure beside the plan's, and how far they are apart."""

from dataclasses import dataclass
from typing import Any

from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.results.kinds.published import Published
from qlora_lowmem.results.tables import plain_row
from reality.explained import explained_bytes
from reality.rows import PublishedPeak


@dataclass(frozen=True)
class Comparison:
    """One row.

    Attributes:
        plan: peaks of the recipe's run on the virtual card.
        program: `loaded`, `allocated` and `reserved` of the measured program itself on it, where it is stated here.
    """

    row: PublishedPeak
    plan: MemoryProfile
    program: dict[str, int] | None = None

    @property
    def plan_bytes(self) -> int:
        """The plan's figure of the same kind as the published one."""
        steady = self.plan.phases["steady"]
        if self.row.measures == "allocated":
            return steady.allocated
        return self.plan.peak.reserved if self.row.measures == "reserved" else self.plan.peak.device

    @property
    def published(self) -> Published:
        """The row that a page shows."""
        return Published(
            source=self.row.source,
            run=self.row.run,
            virtual_card=self.row.card,
            measures=self.row.measures,
            measured_bytes=self.row.measured_bytes,
            measured_versions=self.row.versions,
            plan_bytes=self.plan_bytes,
            explained_bytes=self.explained,
            agrees_with_its_rounding=self.agrees,
            program_bytes=(self.program or {}).get(self.row.measures),
        )

    @property
    def difference(self) -> float | None:
        """The plan over the published figure, less 1; None where no peak was published."""
        return self.published.error if self.published.is_peak else None

    @property
    def explained(self) -> int:
        """Bytes that the measured run holds and a recipe's does not, by its description."""
        return explained_bytes(self.row)

    @property
    def left(self) -> float | None:
        """The difference once the explained bytes are added to the plan."""
        return self.published.left if self.published.is_peak else None

    @property
    def program_difference(self) -> float | None:
        """The measured program on the virtual card over the published figure, less 1."""
        return self.published.program_error

    @property
    def program_growth_difference(self) -> float | None:
        """The same of what was allocated beyond the loaded model, where that was published."""
        if self.program is None or self.row.loaded_bytes is None:
            return None
        grown = self.program["allocated"] - self.program["loaded"]
        return grown / (self.row.measured_bytes - self.row.loaded_bytes) - 1

    @property
    def agrees(self) -> bool | None:
        """Within the bounds of a rounded figure, or out of memory on the card as published; None for other rows."""
        if self.row.measures == "out of memory":
            return self.plan_bytes > self.row.measured_bytes
        if self.row.low_bytes is None or self.row.high_bytes is None:
            return None
        return self.row.low_bytes <= self.plan_bytes <= self.row.high_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, a column a figure."""
        found = plain_row(self.published) | {
            "measured_provenance": "measured by others: see source",
            "plan_allocated_bytes": self.plan.peak.allocated,
            "plan_reserved_bytes": self.plan.peak.reserved,
            "plan_device_bytes": self.plan.peak.device,
            "plan_provenance": "virtual",
            "difference": self.difference,
            "left": self.left,
            "program_difference": self.program_difference,
            "program_growth_difference": self.program_growth_difference,
        }
        return {name: found[name] for name in _ORDER}


# Of the fields in the files.
_ORDER = (
    *("source", "run", "virtual_card", "measures", "measured_bytes", "measured_provenance", "measured_versions"),
    *("plan_bytes", "plan_allocated_bytes", "plan_reserved_bytes", "plan_device_bytes", "plan_provenance"),
    *("difference", "explained_bytes", "left", "agrees_with_its_rounding"),
    *("program_bytes", "program_difference", "program_growth_difference"),
)
