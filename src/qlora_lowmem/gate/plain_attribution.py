"""From the allocator's history of a stranger's test to an `Attribution`: by kind, by block of its model, by line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.memory.attribution import Attribution, OwnerLine, block_of
from qlora_lowmem.memory.history import BEFORE, Block, History
from qlora_lowmem.memory.kinds import KINDS, owner_line
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.timeline import timeline

_PREFIX = {"forward": "activations", "recompute": "recomputed", "backward": "backward"}
_MAX_OWNERS = 40


@dataclass(frozen=True, slots=True)
class PlainOwner:
    """A known tensor: its kind (`memory.kinds.KINDS`), the parameter it belongs to, its dtype and shape."""

    kind: str
    name: str
    layout: str


@dataclass(frozen=True)
class PlainEvidence:
    """What was known while the history was recorded.

    Attributes:
        scope_of: from an allocation's metadata to its `plain_scopes.PlainScope`, or None.
        seen: tensors met: (position in the log of scopes, address of the storage, owner), in order.
        at_end: owners of what was alive at the end, by address.
    """

    scope_of: Callable[[str], Any]
    seen: Sequence[tuple[int, int, PlainOwner]]
    at_end: Mapping[int, PlainOwner]


def attribute(history: History, evidence: PlainEvidence, profile: MemoryProfile, root: str = "") -> Attribution | None:
    """The peak of `history` by kind; None if it is higher than what torch counted, and so cannot be believed.

    Args:
        root: beginning of the paths of the project's own code, left out of lines.
    """
    ((phase, highest),) = profile.phases.items()
    missing = highest.allocated - history.peak_bytes
    if missing < 0:
        return None
    blocks = history.blocks
    owners = _owners(history, evidence)
    scopes = [evidence.scope_of(block.note) for block in blocks]
    kinds = [_kind(block, owner, scope) for block, owner, scope in zip(blocks, owners, scopes, strict=True)]
    peak = history.peak_event
    alive = [index for index, block in enumerate(blocks) if block.born <= peak < block.died]
    sums = dict.fromkeys(KINDS, 0)
    modules: dict[str, int] = {}
    for index in alive:
        block, owner, scope = blocks[index], owners[index], scopes[index]
        sums[kinds[index]] += block.requested
        sums["rounding"] += block.size - block.requested
        name = block_of(_module(owner, scope))
        modules[name] = modules.get(name, 0) + block.requested
    sums["unexplained"] += missing
    sums["slack"] = highest.reserved - highest.allocated
    sums["outside"] = highest.device - highest.reserved
    youngest = next((scopes[index] for index in reversed(alive) if scopes[index] is not None), None)
    return Attribution(
        device=profile.device,
        provenance=profile.provenance,
        phase=phase,
        moment=_moment(youngest),
        kinds={kind: count for kind, count in sums.items() if count},
        allocated_bytes=highest.allocated,
        reserved_bytes=highest.reserved,
        device_bytes=highest.device,
        owners=_lines(((blocks[i], kinds[i], owners[i], scopes[i]) for i in alive), root),
        timeline=timeline(history, kinds, [scope.phase if scope else "" for scope in scopes], list(KINDS)),
        modules=dict(sorted(modules.items())),
    )


def _owners(history: History, evidence: PlainEvidence) -> list[PlainOwner | None]:
    events = len(history.times)
    at: dict[int, list[int]] = {}
    for index, block in enumerate(history.blocks):
        at.setdefault(block.address, []).append(index)
    found: list[PlainOwner | None] = [None] * len(history.blocks)
    for position, address, owner in evidence.seen:
        earlier = [i for i in at.get(address, ()) if _position(history.blocks[i]) < position]
        if earlier:
            found[earlier[-1]] = owner
    for index, block in enumerate(history.blocks):
        if block.died == events and block.address in evidence.at_end:
            found[index] = evidence.at_end[block.address]
    return found


def _position(block: Block) -> int:
    return int(block.note) if block.note.isdigit() else -1


def _kind(block: Block, owner: PlainOwner | None, scope: Any) -> str:
    if owner is not None:
        return owner.kind
    if scope is None or scope.phase == "outside":
        computes_loss = any("loss" in f["name"] or "cross_entropy" in f["name"] for f in block.frames[:6])
        return "loss" if computes_loss else "input"
    if scope.phase == "optimizer":
        return "optimizer_step"
    return "loss" if scope.module_type == "loss" else f"{_PREFIX[scope.phase]}_{scope.module_type}"


def _module(owner: PlainOwner | None, scope: Any) -> str:
    return owner.name if owner is not None else str(scope.module) if scope is not None else ""


def _moment(scope: Any) -> str:
    if scope is None:
        return "at the start"
    where = f" of {scope.module}" if scope.module else ""
    return f"{'the test' if scope.phase == 'outside' else scope.phase}{where}{f' ({scope.node})' if scope.node else ''}"


def _lines(rows: Iterable[tuple[Block, str, PlainOwner | None, Any]], root: str) -> tuple[OwnerLine, ...]:
    groups: dict[tuple[str, str], list[tuple[int, str, str]]] = {}
    for block, kind, owner, scope in rows:
        line = "before the test" if block.born == BEFORE else owner_line(block.frames, scope).removeprefix(root)
        member = (block.requested, _module(owner, scope), owner.layout if owner else "")
        groups.setdefault((kind, line), []).append(member)
    lines = []
    for (kind, line), members in groups.items():
        _, module, layout = max(members, key=lambda member: member[0])
        lines.append(OwnerLine(kind, line, module, layout, sum(size for size, _, _ in members), len(members)))
    lines.sort(key=lambda line: (-line.bytes, line.kind, line.line))
    return tuple(lines[:_MAX_OWNERS])
