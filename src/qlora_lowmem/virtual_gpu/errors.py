"""What can go wrong with a virtual GPU, each with a message that says what to do."""

import difflib
from collections.abc import Iterable


class VirtualGPUError(Exception):
    """Base of everything that this package raises."""


class VirtualGPUUnavailable(VirtualGPUError):
    """This machine or this Python environment cannot host a virtual GPU. The message says why and what to do."""


class UnknownCardError(VirtualGPUError):
    """A card's name that is not in the table."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        plain = {_plain(card): card for card in known}
        close = [plain[match] for match in difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.6)]
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"unknown card {name!r}.{hint} Known cards: {', '.join(known)}")
        self.name = name


def _plain(name: str) -> str:
    """What people vary least in a card's name: `RTX 4050 6GB` and `rtx-4050-laptop-6gb` are close."""
    return "".join(part for part in name.lower().replace(" ", "-").split("-") if part not in ("laptop", "nvidia"))


class JobFailedError(VirtualGPUError):
    """The server that ran a job ended before the job did."""
