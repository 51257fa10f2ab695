"""`python -m qlora_lowmem.longest`."""

import sys

from qlora_lowmem.commands.longest import main

if __name__ == "__main__":
    sys.exit(main())
