"""`python -m qlora_lowmem.report.page`."""

import sys

from qlora_lowmem.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
