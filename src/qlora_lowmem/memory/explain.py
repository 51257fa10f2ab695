"""`python -m qlora_lowmem.memory.explain`: `qlora_lowmem.explain`, under the name of the room that it shows."""

import sys

from qlora_lowmem.explain import main

if __name__ == "__main__":
    sys.exit(main())
