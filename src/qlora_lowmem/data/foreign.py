"""Samples as other programs write them, read as ours where their meaning is certain; what was read so is said once.

- ShareGPT: `conversations` of `from` (human, gpt, system) and `value`, or of `role` and `content`; `system` beside.
- Alpaca: `instruction`, `input`, `output`; LLaMA-Factory's `system` and `history` beside.
- OpenAI's files for fine-tuning: content in parts of text, the role `developer`, `weight` 0 or 1 of an assistant.
- Keys beside a sample that is complete without them (`id`, `source`) are not read.
"""

import difflib
from collections.abc import Callable
from typing import Any

from qlora_lowmem.data.formats import COLUMNS, TOOLS
from qlora_lowmem.data.values import FaultySampleError

Say = Callable[[str], None]

_KNOWN = frozenset({TOOLS, *(key for required, _ in COLUMNS.values() for key in required)})
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ALPACA = {"instruction", "input", "output", "system", "history", "text"}


def as_ours(value: dict[str, Any], say: Say, unread: Callable[[str], None]) -> dict[str, Any]:
    """The sample with the keys and messages of our formats; unchanged where nothing is known of it.

    Args:
        say: takes each sentence about what was read as what; the same for each sample of a kind.
        unread: takes each key that is left unread.

    Raises:
        FaultySampleError: it is of a known kind, and cannot be read as ours.
    """
    if {"chosen", "rejected"} <= value.keys():
        raise FaultySampleError(
            "wrong keys",
            "is a preference (chosen, rejected), and answers are what is learned here: write a file of the chosen ones "
            "with qlora-lowmem data convert FILE OUT.jsonl --completion chosen (or --messages chosen)",
        )
    if "conversations" in value and "messages" not in value and isinstance(value["conversations"], list):
        value = _from_sharegpt(value, say)
    elif {"instruction", "output"} <= value.keys() and not _KNOWN & value.keys() - {"text", TOOLS}:
        value = _from_alpaca(value, say)
    value = {
        key: [_message(message, say) for message in each]
        if key in _KNOWN - {TOOLS} and isinstance(each, list)
        else each
        for key, each in value.items()
    }
    if not any(set(required) <= value.keys() for required, _ in COLUMNS.values()):
        return value
    # What stands beside a complete sample is left out; a key that looks like one of ours stays, to be told as a fault.
    rest = [key for key in value if key not in _KNOWN and not difflib.get_close_matches(key.lower(), _KNOWN, n=1)]
    for key in rest:
        unread(key)
    return {key: each for key, each in value.items() if key not in rest}


def _from_sharegpt(value: dict[str, Any], say: Say) -> dict[str, Any]:
    say("'conversations' (ShareGPT) are read as messages")
    messages: list[Any] = _system_of(value)
    for index, turn in enumerate(value["conversations"]):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            messages.append(turn)
            continue
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
            raise FaultySampleError(
                "messages",
                f"conversations[{index}] is from {turn['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}. Calls of "
                "tools have no one form in ShareGPT: write them as tool_calls",
            )
        rest = {key: each for key, each in turn.items() if key not in ("from", "value")}
        messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **rest})
    beside = {key: each for key, each in value.items() if key not in ("conversations", "system")}
    return beside | {"messages": messages}


def _from_alpaca(value: dict[str, Any], say: Say) -> dict[str, Any]:
    beside = {key: each for key, each in value.items() if key not in _ALPACA}
    given = value.get("input")
    prompt = value["instruction"]
    if isinstance(given, str) and given.strip() and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{given}"
    if not {"system", "history"} & value.keys():
        say("'instruction', 'input' and 'output' (Alpaca) are read as prompt and completion, a blank line between the "
            "first two")  # fmt: skip
        return beside | {"prompt": prompt, "completion": value["output"]}
    say("'instruction', 'input' and 'output' (Alpaca) are read as messages, 'system' and 'history' before them")
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(each, list) and len(each) == 2 for each in history):
        raise FaultySampleError("messages", "'history' is no list of pairs; write [[question, answer], ...]")
    messages = _system_of(value)
    for asked, answer in history:
        # An earlier answer is context here, as it is where this form comes from.
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "weight": 0}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": value["output"]}]
    return beside | {"messages": messages}


def _system_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    text = value.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _message(message: Any, say: Say) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") == "developer":
        say("the role 'developer' is read as system")
        message = message | {"role": "system"}
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        say("content in parts of text is read as one text")
        message = message | {"content": "".join(part["text"] for part in parts)}
    if message.get("role") == "assistant" and message.get("weight") in (0, 1):
        if message["weight"]:
            return {key: each for key, each in message.items() if key != "weight"}
        say("an assistant's message of 'weight' 0 is context, with no loss on it")
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
