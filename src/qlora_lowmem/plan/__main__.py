"""`python -m qlora_lowmem.plan`."""

import sys

from qlora_lowmem.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
