"""The key of figures that this environment makes. Imports no torch."""

import os
import re
from collections.abc import Mapping

from qlora_lowmem.environment import versions
from qlora_lowmem.results.kinds.verdicts import Key

# In the order in which torch 2.14 reads them; the first that is set decides.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def key_of(
    device: str, provenance: str, allocator: str, recipe: str = "", found: Mapping[str, str] | None = None
) -> Key:
    """The key of a run in this environment.

    Args:
        allocator: options of the caching allocator.
        recipe: the recipe's hash, empty for a test.
        found: versions; None for those that are installed here.
    """
    present = versions() if found is None else found
    build = re.search(r"\+cu(\d+)(\d)$", present["torch"])
    return Key(
        device=device,
        provenance=provenance,
        torch=present["torch"],
        cuda=f"{build[1]}.{build[2]}" if build else "none",
        transformers=present["transformers"],
        peft=present["peft"],
        trl=present["trl"],
        bitsandbytes=present["bitsandbytes"],
        allocator=allocator,
        recipe=recipe,
    )


def allocator_of_environment() -> str:
    """The allocator's options that environment variables set; `default` where none is."""
    return next((os.environ[name] for name in _ALLOCATOR_VARIABLES if os.environ.get(name)), "default")
