"""`python -m qlora_lowmem.watch`."""

import sys

from qlora_lowmem.commands.watch import main

if __name__ == "__main__":
    sys.exit(main())
