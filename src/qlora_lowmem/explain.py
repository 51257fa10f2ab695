"""`python -m qlora_lowmem.explain`."""

import sys

from qlora_lowmem.commands.explain import main

if __name__ == "__main__":
    sys.exit(main())
