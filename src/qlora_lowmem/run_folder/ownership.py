"""What in an output folder is this command's own: nothing else is ever replaced or removed."""

import json
from pathlib import Path

from qlora_lowmem.errors import UsageError
from qlora_lowmem.memory.profile import MEMORY_FILE, read_live
from qlora_lowmem.run_folder.manifest import MANIFEST
from qlora_lowmem.run_folder.marker import RECIPE_FILE, is_marker

TOTALS = "totals.json"  # of `running_totals.py`
# What a run puts into its folder, by names that other tools use too.
_WRITTEN = (
    *("checkpoint-*", "README.md", "log.jsonl", ".saving", "adapter_*"),
    *("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
_SHOWN = 4


def refuse_foreign(output_dir: Path) -> None:
    """Refuse a folder that holds files which the run would replace and which no run of this command has made.

    Raises:
        UsageError: there are such files.
    """
    marker = output_dir / RECIPE_FILE
    if is_marker(marker) or not output_dir.is_dir():
        return
    found = sorted({path.name for pattern in _WRITTEN for path in output_dir.glob(pattern)})
    found += [name for name in (RECIPE_FILE, ".lock") if _holds_something(output_dir / name)]
    found += [MEMORY_FILE] if not _readings(output_dir / MEMORY_FILE) else []
    if not found:
        return
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    why = f"its {RECIPE_FILE} is none of this command's" if marker.exists() else f"no {RECIPE_FILE} says whose"
    raise UsageError(
        f"run.output_dir: {str(output_dir)!r} holds {shown}, and {why}, so a run would replace files that are not its "
        f"own. Give another folder with --output-dir, or move these away{_how_to_go_on(output_dir)}"
    )


def is_our_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is this command's, whole or torn: it has our manifest, or a file that no other tool saves.

    An empty folder has nothing to lose.
    """
    try:
        if isinstance(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"], dict):
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {TOTALS, RECIPE_FILE})


def _how_to_go_on(output_dir: Path) -> str:
    """Where a checkpoint remembers its run, the run can be gone on with."""
    copies = [path for path in output_dir.glob(f"checkpoint-*/{RECIPE_FILE}") if is_marker(path)]
    if not copies:
        return ""
    newest = max(copies, key=lambda path: path.stat().st_mtime)
    return (
        f". To go on from these checkpoints, restore the file that they were made with: copy {str(newest)!r} to "
        f"{str(output_dir / RECIPE_FILE)!r}"
    )


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _readings(path: Path) -> bool:
    """Whether a job's memory stands there, as a run on a virtual card leaves it; or nothing."""
    try:
        read_live(path.parent)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return True
