"""Every byte of a peak, by kind: from a replayed history and what is known of its tensors. Touches no device."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.files import Count
from qlora_lowmem.memory.history import BEFORE, Block, History
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED, Namer
from qlora_lowmem.memory.profile import MemoryProfile, Provenance

if TYPE_CHECKING:  # these import torch, and tables are made without it
    from qlora_lowmem.memory.owners import Owner
    from qlora_lowmem.memory.scopes import Scope

MAX_OWNERS = 40  # lines of code
MAX_POINTS = 400  # of a timeline: few enough to draw
_REPEATED = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")
_TENSOR = re.compile(r"\.(?:weight|bias|grad|quant_state|exp_avg|exp_avg_sq|step)\b.*$")


def block_of(name: str) -> str:
    """The block of the model that a tensor or module belongs to: the repeated one, else the module itself.

    `model.layers.4.mlp.up.weight` is in `model.layers.4`, `lm_head.weight` in `lm_head`.
    """
    repeated = _REPEATED.match(name)
    return repeated.group(0) if repeated else _TENSOR.sub("", name)


@dataclass(frozen=True)
class OwnerLine:
    """Blocks of one kind that one line of code allocated.

    Attributes:
        kind: key in `kinds.KINDS`.
        line: `package/file.py:line function`, or the autograd node (`autograd: MulBackward0`).
        module: the module or tensor of the largest of them.
        layout: dtype and shape of the largest, where its tensor is known; else empty.
        bytes, blocks: requested bytes of all of them, and how many they are.
    """

    kind: str
    line: str
    module: str
    layout: str
    bytes: Count
    blocks: Count


@dataclass(frozen=True)
class Timeline:
    """A step's memory over the allocator's events.

    Attributes:
        kinds: the kinds that occur, in the order of `kinds.KINDS`.
        events: index of the event of each point, rising; -1 is before the first.
        microseconds: time of each point since the first event.
        phases: where the step was at each point: `forward`, `backward`, ...
        bytes: for each point, bytes by kind in the order of `kinds`; a row sums to what was allocated then.
    """

    kinds: tuple[str, ...]
    events: tuple[int, ...]
    microseconds: tuple[int, ...]
    phases: tuple[str, ...]
    bytes: tuple[tuple[Count, ...], ...]


@dataclass(frozen=True)
class Attribution:
    """What a card held at the allocated peak of a phase, byte by byte.

    Attributes:
        device, provenance: as in `MemoryProfile`.
        phase: the phase whose peak it is.
        moment: where the step was then, with the module's class: `recompute of model.layers.39.mamba (Mamba2)`.
        kinds: bytes by key of `kinds.KINDS`, zeros left out, in that order. They sum to `device_bytes`, and without
            the kinds `slack` and `outside` to `allocated_bytes`, exactly.
        allocated_bytes, reserved_bytes, device_bytes: the phase's peaks, as in `Peak`.
        owners: the lines of code that own most, largest first.
        modules: requested bytes of all that was alive at the peak, by block of the model (`block_of`); empty name:
            outside of the model.
        timeline: allocated bytes by kind over the step (the micro-batch in which the peak came).
        faults: events of the allocator's history that could not be followed; 0 unless torch's allocator has changed.
    """

    device: str
    provenance: Provenance
    phase: str
    moment: str
    kinds: Mapping[str, int]
    allocated_bytes: Count
    reserved_bytes: Count
    device_bytes: Count
    owners: tuple[OwnerLine, ...]
    timeline: Timeline
    faults: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises:
        ValueError: an unknown kind, a negative one, or kinds that do not sum to the peaks.
        """
        strange = [kind for kind, count in self.kinds.items() if kind not in KINDS or count < 0]
        if strange:
            raise ValueError(f"{', '.join(strange)}: not a kind, or a negative number of bytes")
        total = sum(self.kinds.values())
        outside = sum(self.kinds.get(kind, 0) for kind in OUTSIDE_ALLOCATED)
        if total != self.device_bytes or total - outside != self.allocated_bytes:
            raise ValueError(
                f"kinds sum to {total - outside} allocated and {total} in all; the peaks are {self.allocated_bytes} "
                f"and {self.device_bytes}"
            )

    @property
    def unexplained_share(self) -> float:
        """The part of the allocated peak that no kind claims, 0 to 1."""
        return self.kinds.get("unexplained", 0) / self.allocated_bytes if self.allocated_bytes else 0.0


@dataclass
class Evidence:
    """What was known of tensors while a history was recorded, by the addresses of their storages.

    Attributes:
        scopes: of that stretch, by position in their log.
        at_start, at_end: owners of what was alive then.
        seen: tensors met in between: (position in the log, address, owner).
    """

    scopes: "Mapping[int, Scope]"
    at_start: "Mapping[int, Owner]" = field(default_factory=dict)
    at_end: "Mapping[int, Owner]" = field(default_factory=dict)
    seen: "list[tuple[int, int, Owner]]" = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    """A block with all that is known of it."""

    block: Block
    owner: "Owner | None"
    scope: "Scope | None"
    kind: str

    @property
    def module(self) -> str:
        """The tensor that lives in it, else the module whose code asked for it."""
        if self.owner is not None:
            return self.owner.name
        return _module(self.kind, self.scope) if self.scope is not None else ""


def explain(history: History, evidence: Evidence, namer: Namer, profile: MemoryProfile, phase: str) -> Attribution:
    """Attribute the peak of `history`, which is the allocated peak of a phase of `profile`.

    Raises:
        QloraLowmemError: the history's peak is higher than what torch counted.
    """
    peak = profile.phases[phase]
    missing = peak.allocated - history.peak_bytes
    if missing < 0:
        raise QloraLowmemError(
            f"the allocator's history comes to {history.peak_bytes} bytes at its peak and torch counted "
            f"{peak.allocated}. Please report this with the versions of torch and the recipe"
        )
    known = _known(history, evidence, namer)
    event = history.peak_event
    alive = [each for each in known if each.block.born <= event < each.block.died]
    sums, modules = dict.fromkeys(KINDS, 0), dict[str, int]()
    for each in alive:
        name = block_of(each.module)
        modules[name] = modules.get(name, 0) + each.block.requested
        sums[each.kind] += each.block.requested
        sums["rounding"] += each.block.size - each.block.requested
    sums["unexplained"] += missing
    sums["slack"] = peak.reserved - peak.allocated
    sums["outside"] = peak.device - peak.reserved
    return Attribution(
        device=profile.device,
        provenance=profile.provenance,
        phase=phase,
        moment=_moment(alive, namer),
        kinds={kind: count for kind, count in sums.items() if count},
        allocated_bytes=peak.allocated,
        reserved_bytes=peak.reserved,
        device_bytes=peak.device,
        owners=_owner_lines(alive, namer),
        timeline=_timeline(history, known),
        faults=history.faults,
        modules=dict(sorted(modules.items())),
    )


def _known(history: History, evidence: Evidence, namer: Namer) -> list[_Known]:
    at: dict[int, list[int]] = {}
    for index, block in enumerate(history.blocks):
        at.setdefault(block.address, []).append(index)
    seen: dict[int, Owner] = {}
    for position, address, owner in evidence.seen:
        earlier = [index for index in at.get(address, ()) if history.blocks[index].position < position]
        if earlier:
            seen[earlier[-1]] = owner
    found = []
    for index, block in enumerate(history.blocks):
        at_end = evidence.at_end.get(block.address) if block.died == len(history.times) else None
        at_start = evidence.at_start.get(block.address) if block.born == BEFORE else None
        known, scope = at_end or at_start or seen.get(index), evidence.scopes.get(block.position)
        found.append(_Known(block, known, scope, known.kind if known is not None else namer.kind(scope, block)))
    return found


def _moment(alive: Sequence[_Known], namer: Namer) -> str:
    """Where the job was when the youngest block came: its scope, corrected by what its kind knows of the code."""
    for each in reversed(alive):
        if each.scope is not None:
            phase = "backward" if each.kind.startswith("backward_") else each.scope.phase
            module = _module(each.kind, each.scope)
            its_class = each.scope.module_class if module == each.scope.module else ""
            known = ", ".join(part for part in (its_class, each.scope.node) if part)
            where = f"{f' of {module}' if module else ''}{f' ({known})' if known else ''}"
            return f"{'the test' if phase == 'outside' else phase}{where}"
    return namer.start


def _module(kind: str, scope: "Scope") -> str:
    """The scope's, or the one around it where the code says that it was another of that one's children."""
    of_type = kind.rpartition("_")[2]
    elsewhere = kind.startswith(("activations_", "recomputed_", "backward_")) and of_type != scope.module_type
    return scope.module.rpartition(".")[0] if elsewhere else scope.module


def _owner_lines(alive: Iterable[_Known], namer: Namer) -> tuple[OwnerLine, ...]:
    groups: dict[tuple[str, str], list[_Known]] = {}
    for each in alive:
        groups.setdefault((each.kind, namer.line(each.scope, each.block)), []).append(each)
    lines = []
    for (kind, line), members in groups.items():
        largest = max(members, key=lambda each: each.block.requested)
        layout = largest.owner.layout if largest.owner is not None else ""
        total = sum(each.block.requested for each in members)
        lines.append(OwnerLine(kind, line, largest.module, layout, total, len(members)))
    lines.sort(key=lambda line: (-line.bytes, line.kind, line.line))
    # What nobody claims is listed whatever its size.
    return (*lines[:MAX_OWNERS], *(line for line in lines[MAX_OWNERS:] if line.kind == "unexplained"))


def chosen_events(totals: Sequence[int], limit: int = MAX_POINTS) -> list[int]:
    """Indexes into `totals`, at most `limit`, rising: first, last, and the highest and lowest of equal stretches.

    The highest of all is always among them.
    """
    count = len(totals)
    if count <= limit:
        return list(range(count))
    stretches = (limit - 2) // 2
    chosen = {0, count - 1}
    for stretch in range(stretches):
        part = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        chosen.add(max(part, key=totals.__getitem__))
        chosen.add(min(part, key=totals.__getitem__))
    return sorted(chosen)


def _timeline(history: History, known: Sequence[_Known]) -> Timeline:
    """Bytes by kind over `history`; `rounding` takes what the blocks are larger than their requests."""
    changes: dict[int, list[tuple[str, int]]] = {}
    phase_at: dict[int, str] = {}
    for each in known:
        block = each.block
        parts = ((each.kind, block.requested), ("rounding", block.size - block.requested))
        changes.setdefault(block.born, []).extend(parts)
        changes.setdefault(block.died, []).extend((key, -count) for key, count in parts)
        phase_at[block.born] = each.scope.phase if each.scope is not None else ""
    there = {"rounding", *(each.kind for each in known)}
    now = {kind: 0 for kind in KINDS if kind in there}
    events, rows, names, times = [], [], [], []
    at, phase = BEFORE, ""
    start = history.times[0] if len(history.times) else 0
    for index in chosen_events(history.totals):
        event = index + BEFORE
        while at <= event:
            for kind, count in changes.get(at, ()):
                now[kind] += count
            phase = phase_at.get(at) or phase
            at += 1
        events.append(event)
        rows.append(tuple(now.values()))
        names.append(phase)
        times.append(history.times[event] - start if event >= 0 else 0)
    return Timeline(tuple(now), tuple(events), tuple(times), tuple(names), tuple(rows))
