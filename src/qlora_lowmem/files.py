"""Small files that appear whole or not at all, and what a person is told where a disk takes none."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.run_folder.manifest import flush


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Around what writes `what` to `path`: a disk that is full or read-only is the user's to repair, no fault of ours.

    Raises:
        UsageError: for any `OSError` inside.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"run.output_dir: {what} cannot be written to {str(path)!r} ({error.strerror or error}). Make room on that "
            "disk or make it writable, then start the same command again; or give another folder with --output-dir"
        ) from error


def replace_text(path: Path, text: str, what: str) -> None:
    """Put `text` in the place of a file, whole or not at all, flushed to the disk.

    Raises:
        UsageError: it cannot be written; what was there is as it was.
    """
    scratch = path.with_name(f".{path.name}")
    with writing(what, path):
        try:
            scratch.write_text(text, encoding="utf-8")
            flush(scratch)
            scratch.replace(path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise


def json_values(content: Any) -> Any:
    """`content` with null for every number that JSON cannot write (RFC 8259 has neither NaN nor infinities)."""
    if isinstance(content, dict):
        return {name: json_values(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_line(content: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(json_values(content), allow_nan=False) + "\n"
