"""Texts and JSON values of a sample, and what they are called."""

import json
from typing import Any, NoReturn

from qlora_lowmem.data.faults import FaultySampleError

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
    bytes: "bytes",
}


def kind_of(value: Any) -> str:
    """What a value is, as JSON names it; a table may hold more than JSON does."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def is_nothing(value: Any) -> bool:
    """Whether a list that need not be there is not: null, or empty, as a list or as the text that tables hold."""
    return value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "null", "[]"))


def check_text(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    """`value` is a text that says something, whole in UTF-8.

    Raises:
        FaultySampleError: it is not.
    """
    if not isinstance(value, str):
        raise FaultySampleError("wrong type", f"{name!r} is {kind_of(value)}, not text; put it in quotes")
    if not may_be_empty and not value.strip():
        raise FaultySampleError("empty", f"{name!r} is empty; write it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError as fault:
        raise FaultySampleError(
            "encoding", f"{name!r} holds half a surrogate pair at {fault.start + 1}; write the character whole"
        ) from None


def check_json(name: str, value: Any) -> None:
    """`value` can be written as JSON in UTF-8, as a chat template writes tools and arguments.

    Raises:
        FaultySampleError: it cannot.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FaultySampleError(
            "encoding", f"{name!r} holds half a surrogate pair; write the character whole"
        ) from None
    except RecursionError:
        raise FaultySampleError("tools", f"{name!r} is nested too deeply; write it flatter") from None
    except TypeError:
        raise FaultySampleError("wrong type", f"{name!r} holds what is not JSON; write texts and numbers") from None


def parse_json(name: str, text: str) -> Any:
    """The value that `text` writes as JSON.

    Raises:
        FaultySampleError: it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise FaultySampleError("tools", f"{name!r} is text that is not JSON; write the object itself") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)
