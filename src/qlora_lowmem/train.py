"""`python -m qlora_lowmem.train`."""

import sys

from qlora_lowmem.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
