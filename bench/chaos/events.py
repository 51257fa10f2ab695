"""What happens to the run, how often and when: drawn from a seed, so that a bad day can be had again."""

import random
from dataclasses import dataclass

# What befalls the process, or its newest checkpoint once it is dead.
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "disk full", "torn checkpoint", "corrupt checkpoint")


@dataclass(frozen=True)
class Event:
    """One misfortune.

    Attributes:
        kind: one of `KINDS`.
        after_steps: steps that this start of the run may log first; 0 strikes while it loads, and a disk is full
            before it starts.
        delay: seconds after that, so that it strikes anywhere in a step or in the writing of a checkpoint.
        choice: in [0, 1), for whatever the event has to choose (a file, a byte, how much room is left).
    """

    kind: str
    after_steps: int
    delay: float
    choice: float


def plan(count: int, seed: int, step_seconds: float) -> list[Event]:
    """`count` events, the kinds as evenly as they go, in random order at random moments.

    SIGTERM and SIGINT need a step to finish, so they strike after the first; one SIGKILL and one full disk in three,
    before.
    """
    rng = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    rng.shuffle(kinds)
    events = []
    for kind in kinds:
        loading = kind in ("SIGKILL", "disk full") and rng.random() < 1 / 3
        steps = 0 if loading else rng.choice((1, 1, 2))
        events.append(Event(kind, steps, rng.uniform(0, 2 * step_seconds), rng.random()))
    return events
