"""Where this package keeps what it can make again: converted models, answers of the planner."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$QLORA_LOWMEM_CACHE`, or `qlora_lowmem` under the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`).

    The virtual GPU, which knows nothing of this package, follows the same rule for its builds.
    """
    if "QLORA_LOWMEM_CACHE" in os.environ:
        return Path(os.environ["QLORA_LOWMEM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_lowmem"
