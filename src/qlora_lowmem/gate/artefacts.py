"""What a failing run leaves behind."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_lowmem.memory.attribution import Attribution


def keep_attribution(folder: Path, case: str, attribution: "Attribution | None") -> str:
    """Write the attribution of a case as JSON and return the file's path; empty where there is none."""
    if attribution is None:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attribution-{re.sub(r'[^A-Za-z0-9_.-]+', '-', case).strip('-')}.json"
    path.write_text(json.dumps({"case": case, "attribution": attribution.to_dict()}, indent=1), encoding="utf-8")
    return str(path)
