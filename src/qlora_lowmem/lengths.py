"""`python -m qlora_lowmem.lengths`."""

import sys

from qlora_lowmem.commands.lengths import main

if __name__ == "__main__":
    sys.exit(main())
