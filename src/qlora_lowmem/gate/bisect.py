"""`python -m qlora_lowmem.gate.bisect`."""

import sys

from qlora_lowmem.commands.bisect import main

if __name__ == "__main__":
    sys.exit(main())
