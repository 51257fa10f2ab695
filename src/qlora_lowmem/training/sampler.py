"""The order of very many samples, computed and not held: a list of it would be 40 bytes a sample of host memory."""

import hashlib
from collections.abc import Iterator

from torch.utils.data import Sampler

# Up to here the trainer's own RandomSampler keeps its list: at most 40 MiB.
LISTED_SAMPLES = 2**20
_ROUNDS = 4


class ComputedOrder(Sampler[int]):
    """Every index below `count` once, in an order that seed and epoch decide, with constant memory.

    A Feistel network over pairs of half-words permutes the indices of the next even power of two (Luby and Rackoff
    1988: four rounds); those from `count` on are sent through again until they fall below it (cycle walking, Black and
    Rogaway 2002, section 3), at most four times on average.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0
        self._half_bits = max(1, (max(1, count - 1).bit_length() + 1) // 2)

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """The pass over the data that the next iteration is."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        keys = self._keys()
        for index in range(self._count):
            place = self._permuted(index, keys)
            while place >= self._count:
                place = self._permuted(place, keys)
            yield place

    def _keys(self) -> list[int]:
        text = f"{self._seed} {self._epoch}".encode()
        digest = hashlib.sha256(text).digest()
        return [int.from_bytes(digest[8 * part : 8 * part + 8], "little") | 1 for part in range(_ROUNDS)]

    def _permuted(self, index: int, keys: list[int]) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in keys:
            # The high half of a 64-bit product depends on every bit of `right`.
            mixed = ((right + 1) * key ^ key >> 17) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 29) & mask)
        return left << self._half_bits | right
