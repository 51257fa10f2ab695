"""What each case of the gate used, and what that is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from qlora_lowmem.results.style import Style, name_rows, plain, row_height, words_behind
from qlora_lowmem.units import MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PeakFigure = Literal["allocated", "reserved", "device"]
FIGURES: tuple[PeakFigure, ...] = get_args(PeakFigure)


@dataclass(frozen=True)
class Key:
    """What two runs must have in common for their bytes to be comparable.

    Attributes:
        device: the card's name.
        provenance: `virtual` or `measured`.
        torch: with its build tag, `2.14.1+cu130`.
        cuda: the version that torch was built for, `13.0`.
        transformers, peft, trl, bitsandbytes: versions, or `not installed`.
        allocator: options of the caching allocator.
        recipe: the recipe's hash; empty for a test, whose code is what is under test.
    """

    device: str
    provenance: str
    torch: str
    cuda: str
    transformers: str
    peft: str
    trl: str
    bitsandbytes: str
    allocator: str
    recipe: str = ""

    def differences(self, other: "Key") -> dict[str, tuple[str, str]]:
        """Fields in which `other` differs: name to (here, there)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass(frozen=True)
class Record:
    """A case's peaks, in bytes.

    Attributes:
        allocated, reserved, device: the highest of all phases, as in `MemoryProfile`.
        phases: allocated peak by phase.
        kinds: bytes by kind (`memory.kinds.KINDS`) at the attributed peak; empty where it was not attributed.
        modules: requested bytes by the block of the model that holds them (`model.layers.4`) at that peak.
        lines: bytes by `kind | line of code` at that peak, the largest ones.
        versions: all that were installed and could matter, also those that the key leaves out.
    """

    key: Key
    allocated: int
    reserved: int
    device: int
    phases: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Record":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: fields that are missing, unknown or of another type.
        """
        record = cls(**{**content, "key": Key(**content["key"])})
        counts = [record.allocated, record.reserved, record.device]
        for group in (record.phases, record.kinds, record.modules, record.lines):
            counts.extend(group.values())
        if any(type(count) is not int for count in counts):
            raise TypeError("a number of bytes is not an integer")
        return record


@dataclass(frozen=True)
class Budget:
    """What a test may use.

    Attributes:
        limit: in bytes.
        of: which figure: what tensors take (`allocated`), what torch took from the card for them (`reserved`), or
            that with the CUDA context (`device`).
        card: the virtual card that it runs on; not used with --gpu.
    """

    limit: int
    of: PeakFigure
    card: str


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


@dataclass(frozen=True)
class Held:
    """One case.

    Attributes:
        name: what people read.
        measured_bytes: the figure that is judged.
        against_bytes: its baseline or limit; None where there is neither.
        fails: whether it is over.
    """

    name: str
    measured_bytes: int
    against_bytes: int | None
    fails: bool


def verdicts(style: Style, cases: Sequence[Held]) -> "Figure":
    """A bar a case with a mark where its baseline or limit is; what fails is striped and says so."""
    figure = style.figure(row_height(style) * len(cases) + (1.2 if style.narrow else 0.8))
    axes = figure.subplots()
    places, height = name_rows(axes, [case.name for case in cases], style)
    for place, case in zip(places, cases, strict=True):
        axes.barh(
            place,
            case.measured_bytes / MIB,
            height=height,
            facecolor=style.theme["bad" if case.fails else "bar"],
            edgecolor=style.theme["paper"],
            linewidth=0,
            hatch="///" if case.fails else None,
        )
        if case.against_bytes is not None:
            reach = height / 2 + 0.08
            mark, floor = case.against_bytes / MIB, style.theme["floor"]
            axes.plot([mark, mark], [place - reach, place + reach], color=floor, linewidth=2.5)
        end = max(case.measured_bytes, case.against_bytes or 0) / MIB
        words = f"{format_bytes(case.measured_bytes)}{', fails' if case.fails else ''}"
        words_behind(axes, words, end, place)
    ends = (max(case.measured_bytes, case.against_bytes or 0) for case in cases)
    largest = max(ends, default=MIB) / MIB
    axes.set_xlim(0, largest * (1.5 if style.narrow else 1.2))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4 if style.narrow else 8)
    axes.set_xlabel("MiB; the mark is the baseline or limit" if style.narrow else _EXPLAINED)
    plain(axes, style, grid="x")
    return figure


_EXPLAINED = "MiB at the peak that is judged; the mark is the baseline or the limit; striped fails"
