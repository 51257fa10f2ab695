"""From a replayed history and what is known of its tensors to an `Attribution`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.memory.attribution import Attribution, OwnerLine, block_of
from qlora_lowmem.memory.history import BEFORE, Block, History
from qlora_lowmem.memory.kinds import KINDS, kind_of, owner_line
from qlora_lowmem.memory.owners import Owner
from qlora_lowmem.memory.profile import Peak, Provenance
from qlora_lowmem.memory.scopes import Scope, ScopeWindow, position_of
from qlora_lowmem.memory.timeline import timeline

MAX_OWNERS = 40


@dataclass
class Evidence:
    """What was known of tensors while a history was recorded, by the addresses of their storages.

    Attributes:
        scopes: the log of scopes of that stretch.
        at_start, at_end: owners of what was alive then.
        seen: tensors met in between: (position in the log, address, owner).
    """

    scopes: ScopeWindow
    at_start: Mapping[int, Owner]
    at_end: Mapping[int, Owner] = field(default_factory=dict)
    seen: list[tuple[int, int, Owner]] = field(default_factory=list)


def explain(
    history: History, evidence: Evidence, phase: str, peak: Peak, device: str, provenance: Provenance
) -> Attribution:
    """Attribute the peak of `history`, which is the allocated one of `phase`.

    Raises:
        QloraLowmemError: the history's peak is higher than what torch counted.
    """
    blocks = history.blocks
    found = _owners(history, evidence)
    scopes = [evidence.scopes.scope_of(block.note) for block in blocks]
    kinds = [
        kind_of(owner, scope, block.frames, before=block.born == BEFORE)
        for block, owner, scope in zip(blocks, found, scopes, strict=True)
    ]
    event = history.peak_event
    alive = [index for index, block in enumerate(blocks) if block.born <= event < block.died]
    sums = dict.fromkeys(KINDS, 0)
    for index in alive:
        sums[kinds[index]] += blocks[index].requested
        sums["rounding"] += blocks[index].size - blocks[index].requested
    missing = peak.allocated - history.peak_bytes
    if missing < 0:
        raise QloraLowmemError(
            f"the allocator's history comes to {history.peak_bytes} bytes at its peak and torch counted "
            f"{peak.allocated}. Please report this with the versions of torch and the recipe"
        )
    sums["unexplained"] += missing
    sums["slack"] = peak.reserved - peak.allocated
    sums["outside"] = peak.device - peak.reserved
    return Attribution(
        device=device,
        provenance=provenance,
        phase=phase,
        moment=_moment([(kinds[index], scopes[index]) for index in alive]),
        kinds={kind: count for kind, count in sums.items() if count},
        allocated_bytes=peak.allocated,
        reserved_bytes=peak.reserved,
        device_bytes=peak.device,
        owners=_owner_lines((blocks[i], kinds[i], found[i], scopes[i]) for i in alive),
        timeline=timeline(history, kinds, [scope.phase if scope else "" for scope in scopes], list(KINDS)),
        faults=history.faults,
        modules=_modules((blocks[i], kinds[i], found[i], scopes[i]) for i in alive),
    )


def _owners(history: History, evidence: Evidence) -> list[Owner | None]:
    """The owner of each block, if one is known."""
    events = len(history.times)
    at: dict[int, list[int]] = {}
    for index, block in enumerate(history.blocks):
        at.setdefault(block.address, []).append(index)
    found: list[Owner | None] = [None] * len(history.blocks)
    for position, address, owner in evidence.seen:
        earlier = [i for i in at.get(address, ()) if position_of(history.blocks[i].note) < position]
        if earlier:
            found[earlier[-1]] = owner
    for index, block in enumerate(history.blocks):
        if block.died == events and block.address in evidence.at_end:
            found[index] = evidence.at_end[block.address]
        elif block.born == BEFORE and block.address in evidence.at_start:
            found[index] = evidence.at_start[block.address]
    return found


def _moment(alive: list[tuple[str, Scope | None]]) -> str:
    """Where the step was when the youngest block came: its scope, corrected by what its kind knows of the code."""
    kind, scope = next(((kind, scope) for kind, scope in reversed(alive) if scope is not None), ("", None))
    if scope is None:
        return "at the start of the step"
    phase = "backward" if kind.startswith("backward_") else scope.phase
    module = _module(kind, scope)
    return f"{phase}{f' of {module}' if module else ''}{f' ({scope.node})' if scope.node else ''}"


def _module(kind: str, scope: Scope | None) -> str:
    """The scope's module, or the one around it where the code says that it was another of its children."""
    if scope is None:
        return ""
    of_type = kind.rpartition("_")[2]
    elsewhere = kind.startswith(("activations_", "recomputed_", "backward_")) and of_type != scope.module_type
    return scope.module.rpartition(".")[0] if elsewhere else scope.module


def _modules(rows: Iterable[tuple[Block, str, Owner | None, Scope | None]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for block, kind, owner, scope in rows:
        name = block_of(owner.name if owner else _module(kind, scope))
        sums[name] = sums.get(name, 0) + block.requested
    return dict(sorted(sums.items()))


def _owner_lines(rows: Iterable[tuple[Block, str, Owner | None, Scope | None]]) -> tuple[OwnerLine, ...]:
    groups: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for block, kind, owner, scope in rows:
        line = (
            "before the recorded step" if block.born == BEFORE and not block.frames else owner_line(block.frames, scope)
        )
        module = owner.name if owner else _module(kind, scope)
        groups.setdefault((kind, line), []).append((block.requested, module, owner.layout if owner else ""))
    lines = []
    for (kind, line), members in groups.items():
        _, module, layout = max(members, key=lambda member: member[0])
        lines.append(OwnerLine(kind, line, module, layout, sum(size for size, _, _ in members), len(members)))
    lines.sort(key=lambda line: (-line.bytes, line.kind, line.line))
    largest = lines[:MAX_OWNERS]
    # What nobody claims is listed whatever its size.
    return (*largest, *(line for line in lines[MAX_OWNERS:] if line.kind == "unexplained"))
