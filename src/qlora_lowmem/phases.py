"""`python -m qlora_lowmem.phases`."""

import sys

from qlora_lowmem.commands.phases import main

if __name__ == "__main__":
    sys.exit(main())
