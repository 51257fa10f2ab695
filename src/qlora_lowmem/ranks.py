"""Which process of several this is, as torchrun and `accelerate launch` say it in the environment.

https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

import os


def rank() -> int:
    """This process' number among all; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number on this machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes() -> int:
    """How many there are on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0
