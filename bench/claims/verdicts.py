"""When a statement is true, partly true or false: the criterion is stated first, the figure judged by it."""

from dataclasses import dataclass
from typing import Literal, Protocol

Verdict = Literal["true", "partly", "false"]

# A figure outside of a claimed range by less than this share of the nearer limit makes the statement partly true.
SLACK = 0.2
# What is called a saving saves at least this share of the peak; what saves less than the smaller share saves nothing.
LEAST_SAVING = 0.05
NO_SAVING = 0.005


class Criterion(Protocol):
    """What a figure is judged by."""

    @property
    def text(self) -> str:
        """The criterion in words."""
        ...

    def judge(self, found: float) -> Verdict:
        """The verdict on `found`."""
        ...


@dataclass(frozen=True)
class Within:
    """The figure lies within limits, both allowed.

    Attributes:
        low, high: the limits, in the figure's own unit.
        claimed: the limits in words, as they were claimed.
    """

    low: float
    high: float
    claimed: str

    @property
    def text(self) -> str:
        """The limits, and how far beyond them is partly."""
        return f"true: {self.claimed}; partly: beyond it by at most {SLACK:.0%} of the nearer limit"

    def judge(self, found: float) -> Verdict:
        """True within the limits, partly near them."""
        if self.low <= found <= self.high:
            return "true"
        near = self.low * (1 - SLACK) <= found <= self.high * (1 + SLACK)
        return "partly" if near else "false"


def about(share: float) -> Within:
    """`share` give or take five points."""
    return Within(share - 0.05, share + 0.05, f"{share:.0%}, give or take 5 points")


def share_between(low: float, high: float) -> Within:
    """A share between two claimed ones."""
    return Within(low, high, f"{low:.0%} to {high:.0%}")


def megabytes(low: int, high: int) -> Within:
    """A number of bytes between two claimed numbers of megabytes (10^6)."""
    return Within(low * 10**6, high * 10**6, f"{low:,} to {high:,} MB")


def gigabytes(low: int, high: int) -> Within:
    """A number of bytes between two claimed numbers of gigabytes (10^9)."""
    return Within(low * 10**9, high * 10**9, f"{low} to {high} GB")


@dataclass(frozen=True)
class Exactly:
    """A count or a number of bytes that is claimed to be another one."""

    value: int

    @property
    def text(self) -> str:
        """That nothing but equality will do."""
        return "true: exactly what was claimed"

    def judge(self, found: float) -> Verdict:
        """True if equal: there is no partly."""
        return "true" if found == self.value else "false"


@dataclass(frozen=True)
class Differs:
    """The change changes something; the figure is what it changes."""

    @property
    def text(self) -> str:
        """That any difference will do."""
        return "true: it makes a difference"

    def judge(self, found: float) -> Verdict:
        """True unless zero: there is no partly."""
        return "true" if found else "false"


@dataclass(frozen=True)
class Saves:
    """The change saves memory; the figure is the saving as a share of the peak before it."""

    @property
    def text(self) -> str:
        """How much is a saving."""
        return f"true: saves at least {LEAST_SAVING:.0%} of the peak; partly: less, but at least {NO_SAVING:.1%}"

    def judge(self, found: float) -> Verdict:
        """True from the least saving on, partly from the share on that is more than nothing."""
        if found >= LEAST_SAVING:
            return "true"
        return "partly" if found >= NO_SAVING else "false"
