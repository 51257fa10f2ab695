"""Which file of a folder cannot be read: libraries that fail to load a model seldom name it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora_lowmem.errors import UsageError

_UNREADABLE = (OSError, ValueError, RecursionError, SafetensorError)


def damaged_file(folder: Path, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> tuple[Path, str] | None:
    """The first file of the folder that is not whole, with the reason; None where all can be read.

    Of weights, the headers are read, which say how long a file is.
    """
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
        except _UNREADABLE as error:
            return path, _reason(error)
    return None


@contextlib.contextmanager
def reading(path: Path, what_to_do: str) -> Iterator[None]:
    """Around the reading of one file.

    Raises:
        UsageError: it cannot be read, or holds something else than it should; names it.
    """
    try:
        yield
    except (*_UNREADABLE, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({_reason(error)}). {what_to_do}") from error


def read_json(path: Path, what_to_do: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: there is none.
    """
    with reading(path, what_to_do):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no object")
        return content


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
