"""What befalls a command."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: its column of the table.
        number: the signal, for those.
        moment: of the signal: `start` is the first half second, `work` anywhere from the start to the end, `kept` once
            the command has left something to go on with; then it is started again, and left alone.
        stream: the descriptor that is closed, full or unread.
    """

    kind: str
    number: int = 0
    moment: str = ""
    stream: int = 0


AT_THE_START = (
    Fault("SIGINT at the start", signal.SIGINT, "start"),
    Fault("SIGTERM at the start", signal.SIGTERM, "start"),
)
AT_WORK = tuple(Fault(number.name, number, "work") for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
THEN_AGAIN = tuple(Fault(f"{each.kind}, then again", each.number, "kept") for each in AT_WORK)
NONE = Fault("none")
UNHEARD = Fault("full stream", stream=2)  # which disturbs nothing
STREAMS = (
    *(Fault("closed stream", stream=number) for number in range(3)),
    Fault("full stream", stream=1),
    Fault("unread pipe", stream=1),
)
FULL_DISK, NO_TARGET = Fault("full disk"), Fault("target that takes nothing")
TORN, FLIPPED, FILE = Fault("torn cache"), Fault("flipped cache"), Fault("file for a cache")
DISKS, CACHES = (FULL_DISK, NO_TARGET), (TORN, FLIPPED, FILE)
