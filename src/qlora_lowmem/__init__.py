"""Will this fine-tuning run fit on that GPU, and how do we keep it fitting?"""

import sys

__version__ = "0.1.0"

if sys.argv and (
    sys.argv[0].rpartition("/")[2] == "qlora-lowmem" or (sys.argv[0] == "-m" and __name__ in str(sys.orig_argv))
):
    # A command: the script, or `python -m`, which is on its way to it by what the packages above it import.
    from qlora_lowmem import signals

    signals.take()
