"""What a failing run leaves behind: the attribution of its peak, and the allocator's snapshot."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from qlora_lowmem.memory.attribution import Attribution


def snapshot_path(folder: Path, case: str) -> Path:
    """Where the snapshot of a case belongs; https://pytorch.org/memory_viz opens it."""
    return folder / f"snapshot-{_file_name(case)}.pickle"


def keep(
    folder: Path, case: str, attribution: "Attribution | None", snapshot: dict[str, Any] | None = None
) -> tuple[str, ...]:
    """Write what there is of a case, and return the files of it: this one's and a snapshot that lies there already."""
    kept = []
    if attribution is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"attribution-{_file_name(case)}.json"
        content = {"case": case, "attribution": msgspec.to_builtins(attribution)}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        kept.append(str(path))
    target = snapshot_path(folder, case)
    if snapshot is not None:
        from qlora_lowmem.memory.recorder import write_snapshot

        folder.mkdir(parents=True, exist_ok=True)
        write_snapshot(snapshot, target)
    if target.is_file():
        kept.append(str(target))
    return tuple(kept)


def _file_name(case: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", case).strip("-")
