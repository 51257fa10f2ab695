"""Will this fine-tuning run fit on that GPU, and how do we keep it fitting?"""

import _signal  # type: ignore[import-not-found]  # `signals` says why not `signal`
import sys

__version__ = "0.1.0"

if sys.argv and (
    sys.argv[0].rpartition("/")[2] == "qlora-lowmem" or (sys.argv[0] == "-m" and __name__ in str(sys.orig_argv))
):
    # A command: the script, or `python -m`, which is on its way to it by what the packages above it import.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # an interrupt of the next line is no traceback
    from qlora_lowmem import signals

    signals.take()
