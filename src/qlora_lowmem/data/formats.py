"""What a sample is: its keys, its texts, and what all samples of a file have in common."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from qlora_lowmem.data.faults import FaultySampleError
from qlora_lowmem.data.messages import check_messages, check_tools
from qlora_lowmem.data.values import check_text, is_nothing, kind_of

DataFormat = Literal["messages", "prompt/completion", "text"]
TrainOn = Literal["all", "completions"]

TOOLS = "tools"
# (keys that a sample has, keys that it may have)
COLUMNS: Mapping[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), (TOOLS,)),
    "prompt/completion": (("prompt", "completion"), (TOOLS,)),
    "text": (("text",), ()),
}
FORMATS = 'one of {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


def check_sample(value: dict[str, Any], train_on: TrainOn) -> tuple[dict[str, Any], str]:
    """A sound sample from an object, and what it holds, in words that all samples of a file share.

    A tool call's arguments become an object and its empty content "", as chat templates read them. Tools and calls that
    are null or empty, as many programs write them where there are none, are left out.

    Raises:
        FaultySampleError: it is no sample.
    """
    if is_nothing(value.get(TOOLS)):
        value = {key: each for key, each in value.items() if key != TOOLS}
    form = _format_of(value)
    if form == "text":
        check_text("text", value["text"])
        return value, form
    if form == "prompt/completion":
        return _check_pair(value)
    messages = check_messages("messages", value["messages"])
    if train_on == "completions" and not _has_assistant(messages):
        raise FaultySampleError(
            "nothing to learn", "has no assistant message, so nothing to learn; add one, or use --train-on all"
        )
    return {"messages": messages} | _tools_of(value), form


def format_of_kind(kind: str) -> DataFormat:
    """The format of what `check_sample` names: pairs of texts and pairs of messages are one format."""
    return next(form for form in COLUMNS if kind.startswith(form))


def _format_of(value: dict[str, Any]) -> DataFormat:
    for form, (required, optional) in COLUMNS.items():
        if set(required) <= set(value) <= {*required, *optional}:
            return form
    known = [key for required, _ in COLUMNS.values() for key in required]
    present = [key for key in known if key in value]
    unknown = [key for key in value if key not in {*known, TOOLS}]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, TOOLS], n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(repr(key) for key in unknown[:5])
        raise FaultySampleError(
            "wrong keys", f"has the unknown key {names}{meant}; remove or rename it: a sample is {FORMATS}"
        )
    if present in (["prompt"], ["completion"]):
        missing = "completion" if present == ["prompt"] else "prompt"
        raise FaultySampleError("wrong keys", f"has {present[0]!r} but no {missing!r}; add it")
    if present == ["text"]:
        raise FaultySampleError("wrong keys", "has 'tools' beside 'text'; tools belong to messages, so remove them")
    if not present and TOOLS in value:
        raise FaultySampleError("wrong keys", "has 'tools' but no 'messages'; add them")
    if not present:
        raise FaultySampleError("wrong keys", f"is an empty object; a sample is {FORMATS}")
    raise FaultySampleError("wrong keys", f"mixes {' and '.join(map(repr, present))}; a sample is {FORMATS}")


def check_one_format(kind: str, unit: str, first_kind: str, first_number: int) -> None:
    """All samples of a file hold the same.

    Raises:
        FaultySampleError: this one does not.
    """
    if kind != first_kind:
        raise FaultySampleError(
            "mixed formats", f"holds {kind}, but {unit} {first_number} holds {first_kind}; use one format a file"
        )


def _check_pair(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = f"'prompt' is {kind_of(prompt)} but 'completion' is {kind_of(completion)}"
        raise FaultySampleError("wrong type", f"{kinds}; write two texts or two lists of messages")
    if not isinstance(prompt, list):
        check_text("prompt", prompt)
        check_text("completion", completion)
        if TOOLS in value:
            raise FaultySampleError("wrong keys", "has 'tools' beside two texts; tools need lists of messages")
        return value, "prompt/completion texts"
    pair = {"prompt": check_messages("prompt", prompt), "completion": check_messages("completion", completion)}
    if not _has_assistant(pair["completion"]):
        raise FaultySampleError("nothing to learn", "'completion' has no assistant message; add the answer to learn")
    return pair | _tools_of(value), "prompt/completion messages"


def _tools_of(value: dict[str, Any]) -> dict[str, Any]:
    return {TOOLS: check_tools(value[TOOLS])} if TOOLS in value else {}


def _has_assistant(messages: list[dict[str, Any]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)
