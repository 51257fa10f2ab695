"""A small caching allocator that keeps torch's rules and writes torch's trace, to make histories for tests."""

from typing import Any

_SMALL = 2**20
_MIB = 2**20


class Allocator:
    """One device, one stream. Blocks are [address, size, requested or None]."""

    def __init__(self) -> None:
        self.trace: list[dict[str, Any]] = []
        self.allocated = 0
        self._segments: list[tuple[str, int, int, list[list[Any]]]] = []  # pool, address, size, blocks
        self._next = 2**30

    def alloc(self, requested: int, note: str = "", frames: list[Any] | None = None) -> int:
        """The address of a block for that many bytes."""
        size = max(512, (requested + 511) // 512 * 512)
        pool = "small" if size <= _SMALL else "large"
        free = [
            (block[1], block[0], blocks, block)
            for kind, _, _, blocks in self._segments
            if kind == pool
            for block in blocks
            if block[2] is None and block[1] >= size
        ]
        if not free:
            self._grow(pool, size)
            return self.alloc(requested, note, frames)
        _, address, blocks, block = min(free, key=lambda item: item[:2])
        rest = block[1] - size
        if rest >= 512 if pool == "small" else rest > _SMALL:
            block[1] = size
            blocks.insert(blocks.index(block) + 1, [address + size, rest, None])
        block[2] = requested
        self.allocated += block[1]
        self._log("alloc", address, requested, note, frames)
        return int(address)

    def free(self, address: int) -> None:
        """Give a block back, merged with free neighbours."""
        for _, _, _, blocks in self._segments:
            for index, block in enumerate(blocks):
                if block[0] == address:
                    self.allocated -= block[1]
                    self._log("free_requested", address, block[2])
                    self._log("free_completed", address, block[2])
                    block[2] = None
                    for left in (index, index - 1):
                        if 0 <= left < len(blocks) - 1 and blocks[left][2] is None and blocks[left + 1][2] is None:
                            blocks[left][1] += blocks.pop(left + 1)[1]
                    return
        raise AssertionError(f"nothing at {address}")

    def release(self) -> None:
        """Give segments back that are free as a whole."""
        for segment in list(self._segments):
            _, address, size, blocks = segment
            if len(blocks) == 1 and blocks[0][2] is None:
                self._segments.remove(segment)
                self._log("segment_free", address, size)

    def snapshot(self) -> dict[str, Any]:
        """As `torch.cuda.memory._snapshot()`, as far as a replay reads it."""
        segments = [
            {
                "device": 0,
                "address": address,
                "total_size": size,
                "is_expandable": False,
                "blocks": [
                    {
                        "address": block[0],
                        "size": block[1],
                        "requested_size": block[2] or 0,
                        "state": "inactive" if block[2] is None else "active_allocated",
                        "frames": [],
                    }
                    for block in blocks
                ],
            }
            for _, address, size, blocks in self._segments
        ]
        return {"segments": segments, "device_traces": [list(self.trace)]}

    def _grow(self, pool: str, size: int) -> None:
        room = 2 * _MIB if pool == "small" else 20 * _MIB if size < 10 * _MIB else -(-size // (2 * _MIB)) * 2 * _MIB
        # Segments touch: blocks must not merge from one into the next.
        self._segments.append((pool, self._next, room, [[self._next, room, None]]))
        self._log("segment_alloc", self._next, room)
        self._next += room

    def _log(self, action: str, address: int, size: int, note: str = "", frames: list[Any] | None = None) -> None:
        time = len(self.trace)
        entry = {"action": action, "addr": address, "size": size, "user_metadata": note, "time_us": time}
        self.trace.append(entry | ({"frames": frames} if frames is not None else {}))
