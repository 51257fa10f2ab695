"""`python -m qlora_lowmem.memory.explain`: the command of `qlora_lowmem.explain`, which may draw where this room may not."""

import sys

from qlora_lowmem.explain import main

if __name__ == "__main__":
    sys.exit(main())
