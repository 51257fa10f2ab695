"""`python -m qlora_lowmem.merge`."""

import sys

from qlora_lowmem.commands.merge import main

if __name__ == "__main__":
    sys.exit(main())
