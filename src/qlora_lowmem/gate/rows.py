"""What the gate knows of one case of a session: plain data that travels with pytest's reports, from workers as well."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qlora_lowmem.gate.budget import Budget
from qlora_lowmem.gate.records import Record


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: the recipe's name, or the test's node id.
        file: the file that states it, from the project's root on, for annotations.
        verdict: a name of `verdicts.Name`, `WITHIN BUDGET` or `OVER BUDGET`.
        record: what it used; None if it came to nothing.
        baseline: what it is held against, if there is any.
        budget: its limit, if it has one.
        fails: whether the test failed for it.
        message: the failure or the advice, rendered.
        artefacts: files that a failing run left: its attribution, its snapshot.
    """

    case: str
    file: str
    verdict: str
    record: Record | None
    baseline: Record | None = None
    budget: Budget | None = None
    fails: bool = False
    message: str = ""
    artefacts: tuple[str, ...] = ()

    @property
    def judged(self) -> int:
        """Bytes of the figure that is judged: the budget's, else what is allocated; 0 where it came to nothing."""
        return int(getattr(self.record, self.budget.of if self.budget else "allocated")) if self.record else 0

    @property
    def held_against(self) -> int | None:
        """Bytes of the budget's limit or of the baseline; None where there is neither."""
        return self.budget.limit if self.budget else self.baseline.allocated if self.baseline else None

    def properties(self) -> list[tuple[str, object]]:
        """For JUnit, bytes as integers."""
        found: list[tuple[str, object]] = [("vram_verdict", self.verdict)]
        if self.record is not None:
            found += [
                ("vram_card", self.record.key.device),
                ("vram_allocated_bytes", self.record.allocated),
                ("vram_reserved_bytes", self.record.reserved),
                ("vram_device_bytes", self.record.device),
            ]
        if self.baseline is not None:
            found.append(("vram_baseline_allocated_bytes", self.baseline.allocated))
        if self.budget is not None:
            found.append(("vram_limit_bytes", self.budget.limit))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Row":
        """The inverse of `to_dict`."""
        record, baseline = (
            Record.from_dict(content[name]) if content[name] is not None else None for name in ("record", "baseline")
        )
        budget = Budget(**content["budget"]) if content["budget"] is not None else None
        artefacts = tuple(content["artefacts"])
        return cls(**{**content, "record": record, "baseline": baseline, "budget": budget, "artefacts": artefacts})
