"""What a sample is: its keys, its texts or messages and tools, and what all samples of a file have in common."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from qlora_lowmem.data.values import (
    FaultySampleError,
    check_json,
    check_kind,
    check_text,
    is_nothing,
    kind_of,
    parse_json,
)

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
    raise FaultySampleError("wrong keys", _what_is_wrong(value))


def _what_is_wrong(value: dict[str, Any]) -> str:
    known = [key for required, _ in COLUMNS.values() for key in required]
    unknown = [key for key in value if key not in {*known, TOOLS}]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, TOOLS], n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(map(repr, unknown[:5]))
        return f"has the unknown key {names}{meant}; remove or rename it: a sample is {FORMATS}"
    present = [key for key in known if key in value]
    if present in (["prompt"], ["completion"]):
        missing = "completion" if present == ["prompt"] else "prompt"
        return f"has {present[0]!r} but no {missing!r}; add it"
    if present == ["text"]:
        return "has 'tools' beside 'text'; tools belong to messages, so remove them"
    if present:
        return f"mixes {' and '.join(map(repr, present))}; a sample is {FORMATS}"
    return "has 'tools' but no 'messages'; add them" if value else f"is an empty object; a sample is {FORMATS}"


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
    """Whether there is one to learn from."""
    return any(message["role"] == "assistant" and "weight" not in message for message in messages)


ROLES = ("system", "user", "assistant", "tool")
# The keys of an assistant's reasoning: as most templates read it, and as gpt-oss' does.
REASONING = ("reasoning_content", "thinking")
# Keys beside role and content.
_MORE_KEYS = {"assistant": ("tool_calls", *REASONING, "weight"), "tool": ("name", "tool_call_id")}
_OPTIONAL = {key for keys in _MORE_KEYS.values() for key in keys}
_MESSAGE = '[{"role": "user", "content": "..."}]'
_CALL = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
_TOOL = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'


def check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    """The messages of a list, made ready for a chat template, or a `FaultySampleError` where one is none."""
    check_kind("messages", repr(name), messages, list, f"a list of messages; write {_MESSAGE}")
    if not messages:
        raise FaultySampleError("empty", f"{name!r} is an empty list; write at least one message: {_MESSAGE}")
    return [_check_message(f"{name}[{index}]", message) for index, message in enumerate(messages)]


def _check_message(place: str, given: Any) -> dict[str, Any]:
    check_kind("messages", place, given, dict, f"a message; write {_MESSAGE}")
    if "role" not in given:
        raise FaultySampleError("messages", f"{place} has no 'role'; write {_MESSAGE}")
    role = given["role"]
    if role not in ROLES:
        raise FaultySampleError("messages", f"{place} has the role {role!r}; allowed: {', '.join(ROLES)}")
    message = {key: value for key, value in given.items() if not (key in _OPTIONAL and _is_absent(key, value))}
    calls = role == "assistant" and "tool_calls" in message
    if "content" not in message and not calls:
        raise FaultySampleError("messages", f"{place} has no 'content'; write {_MESSAGE}")
    _check_keys(place, role, message)
    content = message.get("content")
    if calls:
        content = "" if content is None else content
        message |= {"content": content, "tool_calls": _check_calls(f"{place}.tool_calls", message["tool_calls"])}
    check_text(f"{place}.content", content, may_be_empty=calls)
    if message.get("weight", 0) != 0:
        raise FaultySampleError("messages", f"{place}.weight is {message['weight']!r}; allowed: 0 and 1")
    for key in ("name", "tool_call_id", *REASONING):
        if key in message:
            check_text(f"{place}.{key}", message[key])
    return message


def _is_absent(key: str, value: Any) -> bool:
    return is_nothing(value) if key in ("tool_calls", *REASONING) else value is None


def _check_keys(place: str, role: str, message: dict[str, Any]) -> None:
    allowed = ("role", "content", *_MORE_KEYS.get(role, ()))
    unknown = sorted(set(message) - set(allowed))
    if not unknown:
        return
    owner = next((each for each, keys in _MORE_KEYS.items() if unknown[0] in keys), None)
    near = difflib.get_close_matches(unknown[0], allowed, n=1)
    advice = f" (it belongs to the role {owner!r})" if owner else f" (did you mean {near[0]!r}?)" if near else ""
    fault = f"{place} has the unknown key {unknown[0]!r}{advice}"
    raise FaultySampleError("messages", f"{fault}; remove it: a message of {role!r} has {', '.join(allowed)}")


def _check_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    check_kind("tools", repr(name), calls, list, f"a list of calls; write [{_CALL}], or leave it out")
    return [_check_call(f"{name}[{index}]", call) for index, call in enumerate(calls)]


def _check_call(name: str, call: Any) -> dict[str, Any]:
    function = _function_of(name, call, _CALL)
    given = function.get("arguments")
    arguments = parse_json(f"{name}.function.arguments", given) if isinstance(given, str) else given
    arguments = {} if arguments is None else arguments
    check_kind("tools", f"'{name}.function.arguments'", arguments, dict, f"an object; write {_CALL}")
    check_json(name, call)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools that a sample may call, or a `FaultySampleError`; a text is read as JSON, as tables hold them."""
    found = parse_json("tools", tools) if isinstance(tools, str) else tools
    check_kind("tools", "'tools'", found, list, f"a list of tools; write [{_TOOL}], or leave it out")
    for index, tool in enumerate(found):
        name = f"tools[{index}]"
        parameters = _function_of(name, tool, _TOOL).get("parameters")
        if parameters is not None:
            check_kind("tools", f"'{name}.function.parameters'", parameters, dict, "a JSON schema")
        check_json(name, tool)
    return list(found)


def _function_of(name: str, value: Any, example: str) -> dict[str, Any]:
    check_kind("tools", repr(name), value, dict, f"an object; write {example}")
    if value.get("type", "function") != "function":
        raise FaultySampleError("tools", f"'{name}.type' is {value['type']!r}; only 'function' is known")
    function = value.get("function")
    if not isinstance(function, dict):
        found = "has no 'function'" if function is None else f"has a 'function' that is {kind_of(function)}"
        raise FaultySampleError("tools", f"{name!r} {found}; write {example}")
    check = function.get("name")
    if not isinstance(check, str) or not check.strip():
        raise FaultySampleError("tools", f"'{name}.function' has no name; write {example}")
    return function
