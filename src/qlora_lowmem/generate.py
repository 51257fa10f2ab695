"""`python -m qlora_lowmem.generate`."""

import sys

from qlora_lowmem.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
