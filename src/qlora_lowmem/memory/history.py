"""The caching allocator's own history, replayed: which blocks were alive at which event, to the byte.

torch records requests (`size` of a trace entry is what was asked for), but counts *blocks*: the request rounded up, and
with the rest of a free block that was too small to split off. The block's size follows from the allocator's rules
(`c10/cuda/CUDACachingAllocator.cpp`: `round_size`, `should_split`, `free_block`, `try_merge_blocks`) and from the
address at which it was placed, so the history is played again on the segments as they were when it began.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Frame = Mapping[str, Any]  # torch's: filename, line, name

_MIN_BLOCK = 512  # kMinBlockSize: every block is a multiple
_SMALL = 2**20  # kSmallSize: up to 1 MiB a request is served from the small pool

BEFORE = -1  # the event index of what was there when the history began


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation.

    Attributes:
        address: where it begins.
        size: bytes that it takes of its segment: what `memory_allocated` counts.
        requested: bytes that were asked for.
        frames: Python frames of the request, innermost first.
        position: in a log of scopes, as torch's `user_metadata` of the request names it; -1 where it names none, and
            for what was there before.
        born: index of the event of its allocation, `BEFORE` for what was there before.
        died: index of the event at which it was freed; the number of events if it was not.
    """

    address: int
    size: int
    requested: int
    frames: Sequence[Frame]
    position: int
    born: int
    died: int


@dataclass(frozen=True)
class History:
    """A stretch of the allocator's life.

    Attributes:
        blocks: every allocation that was alive in it, in order of birth.
        totals: allocated bytes after each event; its first entry is from before the first event.
        times: microseconds of each event, by torch's clock; one entry less than `totals`.
        faults: events and final blocks that do not agree with the allocator's rules; 0 unless a new version of torch
            changed them.
    """

    blocks: tuple[Block, ...]
    totals: Sequence[int]
    times: Sequence[int]
    faults: int

    @property
    def peak_event(self) -> int:
        """The first event after which most bytes were allocated; `BEFORE` if it never was more than at the start."""
        return max(range(len(self.totals)), key=self.totals.__getitem__) + BEFORE

    @property
    def peak_bytes(self) -> int:
        """Allocated bytes then."""
        return self.totals[self.peak_event - BEFORE]


def replay(before: Mapping[str, Any], after: Mapping[str, Any], device: int = 0) -> History:
    """The history between two snapshots of torch, its events taken from the second.

    Args:
        before: a snapshot taken where the recording began; of it only the segments are read.
        after: a snapshot taken later, with all events since then in its trace.
        device: index of the CUDA device.
    """
    play = _Play(_segments(before, device))
    traces = after["device_traces"]
    for entry in traces[device] if device < len(traces) else ():
        play.apply(entry)
    return play.finish(_segments(after, device))


def _segments(snapshot: Mapping[str, Any], device: int) -> list[Mapping[str, Any]]:
    return [segment for segment in snapshot["segments"] if segment.get("device", 0) == device]


class _Play:
    """The allocator's segments, driven by its trace."""

    def __init__(self, segments: Iterable[Mapping[str, Any]]) -> None:
        self._free: dict[int, int] = {}  # start of a free block to its size
        self._free_ends: dict[int, int] = {}  # end of a free block to its start
        self._walls: set[int] = set()  # starts of segments: free blocks do not merge across them
        self._ranges_end: set[int] = set()  # ends of expandable segments, which may grow there
        self._expandable = False
        self._held: dict[int, Block] = {}  # by address, what is in use
        self._awaiting: dict[int, int] = {}  # freed by its owner, still in use by another stream: address to size
        self._blocks: list[Block] = []
        self._allocated = 0
        self._faults = 0
        for segment in segments:
            self._walls.add(segment["address"])
            if segment.get("is_expandable"):
                self._expandable = True
                self._ranges_end.add(segment["address"] + segment["total_size"])
            for block in segment["blocks"]:
                self._place(block)
        self._totals = array("q", [self._allocated])
        self._times = array("q")

    def _place(self, block: Mapping[str, Any]) -> None:
        address, size = block["address"], block["size"]
        if block["state"] == "active_allocated":
            self._held[address] = Block(address, size, block["requested_size"], block.get("frames", ()), -1, BEFORE, -1)
            self._allocated += size
        elif block["state"] == "inactive":
            self._add_free(address, size, merge=False)
        else:
            self._awaiting[address] = size

    def apply(self, entry: Mapping[str, Any]) -> None:
        action = entry["action"]
        if action == "alloc":
            self._alloc(entry)
        elif action == "free_requested":
            self._free_requested(entry["addr"])
        elif action == "free_completed":
            self._free_completed(entry["addr"])
        elif action == "segment_alloc":
            self._walls.add(entry["addr"])
            self._add_free(entry["addr"], entry["size"], merge=False)
        elif action == "segment_free":
            self._take_free(entry["addr"], entry["size"])
            self._walls.discard(entry["addr"])
        elif action == "segment_map":
            self._map(entry["addr"], entry["size"])
        elif action == "segment_unmap":
            self._unmap(entry["addr"], entry["size"])
        self._totals.append(self._allocated)
        self._times.append(int(entry.get("time_us", 0)))

    def _alloc(self, entry: Mapping[str, Any]) -> None:
        address, requested = entry["addr"], entry["size"]
        size = rounded = max(_MIN_BLOCK, -(-requested // _MIN_BLOCK) * _MIN_BLOCK)
        room = self._pop_free(address)
        if room is None or room < rounded:
            self._faults += 1
        else:
            rest = room - rounded
            splits = rest >= _MIN_BLOCK if rounded <= _SMALL or self._expandable else rest > _SMALL
            if splits:
                self._add_free(address + rounded, rest, merge=False)
            else:
                size = room
        note = entry.get("user_metadata", "")
        position = int(note) if note.isdigit() else -1
        self._held[address] = Block(address, size, requested, entry.get("frames", ()), position, len(self._times), -1)
        self._allocated += size

    def _free_requested(self, address: int) -> None:
        held = self._held.pop(address, None)
        if held is None:
            self._faults += 1
            return
        self._blocks.append(replace(held, died=len(self._times)))
        self._allocated -= held.size
        self._awaiting[address] = held.size

    def _free_completed(self, address: int) -> None:
        if address in self._held:  # a history without `free_requested`
            self._free_requested(address)
        size = self._awaiting.pop(address, None)
        if size is None:
            self._faults += 1
            return
        self._add_free(address, size)

    def _map(self, address: int, size: int) -> None:
        self._expandable = True
        _swap(address, self._ranges_end, self._walls)
        _swap(address + size, self._walls, self._ranges_end)
        self._add_free(address, size)

    def _unmap(self, address: int, size: int) -> None:
        self._take_free(address, size)
        _swap(address, self._walls, self._ranges_end)
        _swap(address + size, self._ranges_end, self._walls)

    def _take_free(self, address: int, size: int) -> None:
        """Remove [address, address + size) from the free block around it."""
        for start, room in self._free.items():
            if start <= address and address + size <= start + room:
                break
        else:
            self._faults += 1
            return
        self._pop_free(start)
        if start < address:
            self._add_free(start, address - start, merge=False)
        if address + size < start + room:
            self._add_free(address + size, start + room - address - size, merge=False)

    def _add_free(self, address: int, size: int, merge: bool = True) -> None:
        if merge:
            before = None if address in self._walls else self._free_ends.pop(address, None)
            if before is not None:
                size += self._free.pop(before)
                address = before
            if address + size not in self._walls:
                size += self._pop_free(address + size) or 0
        self._free[address] = size
        self._free_ends[address + size] = address

    def _pop_free(self, start: int) -> int | None:
        size = self._free.pop(start, None)
        if size is not None:
            del self._free_ends[start + size]
        return size

    def finish(self, segments: Iterable[Mapping[str, Any]]) -> History:
        """Check the end against the allocator's own state there."""
        blocks = [b for s in segments for b in s["blocks"] if b["state"] == "active_allocated"]
        there = {block["address"]: block["size"] for block in blocks}
        here = {address: held.size for address, held in self._held.items()}
        self._faults += sum(there.get(address) != here.get(address) for address in there.keys() | here.keys())
        self._blocks.extend(replace(held, died=len(self._times)) for held in self._held.values())
        self._blocks.sort(key=lambda block: block.born)
        return History(tuple(self._blocks), self._totals, self._times, self._faults)


def _swap(address: int, one: set[int], other: set[int]) -> None:
    """What begins or ends at `address`: a border of the kind `one` is gone, or one of the kind `other` has come."""
    if address in one:
        one.remove(address)
    else:
        other.add(address)
