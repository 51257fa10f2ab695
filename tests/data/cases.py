"""Malformed data, made by hand: lines of JSON Lines, whole files, rows of tables; what is said of each, and why.

A case is (what it is, content, kind of the fault, words that its message holds).
"""

from typing import Any, NamedTuple

from qlora_lowmem.data.values import FaultKind

TEXT = '{"text": "a"}'
USER = '{"role": "user", "content": "a"}'
ANSWER = '{"role": "assistant", "content": "b"}'
CHAT = f'{{"messages": [{USER}, {ANSWER}]}}'
PAIR = '{"prompt": "a", "completion": "b"}'
CHAT_PAIR = f'{{"prompt": [{USER}], "completion": [{ANSWER}]}}'
TOOL = '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}'
CALL = '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}'


class BadLine(NamedTuple):
    """A second line that is refused, after a sound first one of the same format."""

    name: str
    line: str | bytes
    kind: FaultKind
    says: tuple[str, ...]
    first: str = TEXT


def chat(message: str) -> str:
    """A conversation with `message` after a user's."""
    return f'{{"messages": [{USER}, {message}]}}'


def calling(calls: str) -> str:
    """A conversation in which the assistant makes `calls`."""
    return chat(f'{{"role": "assistant", "content": "", "tool_calls": {calls}}}')


def with_tools(tools: str) -> str:
    """A conversation that brings `tools`."""
    return f'{{"messages": [{USER}, {ANSWER}], "tools": {tools}}}'


_ONE_LINE = "a whole sample stands on one line"
_PLAIN = "write one JSON object a line"

NOT_JSON = [
    BadLine("brace missing", '{"text": "a"', "not JSON", ("Expecting ',' delimiter at column 13", _PLAIN)),
    BadLine("quote missing", '{"text": "a}', "not JSON", ("Unterminated string", "column 10")),
    BadLine("single quotes", "{'text': 'a'}", "not JSON", ("double quotes",)),
    BadLine("comma at the end", '{"text": "a"},', "not JSON", ("Extra data at column 14", "no comma between")),
    BadLine("two objects", '{"text": "a"}{"text": "b"}', "not JSON", ("Extra data at column 14",)),
    BadLine("opening bracket of a list", "[", "not JSON", ("no brackets around the lines",)),
    BadLine("closing bracket of a list", "]", "not JSON", ("Expecting value", _PLAIN)),
    BadLine("a pretty-printed object", "{", "not JSON", (_ONE_LINE,)),
    BadLine("its second line", '  "text": "a"', "not JSON", ("Extra data",)),
    BadLine("plain words", "plain words", "not JSON", (_PLAIN,)),
    BadLine("CSV", "prompt,completion", "not JSON", (_PLAIN,)),
    BadLine("YAML", "text: a", "not JSON", (_PLAIN,)),
    BadLine("XML", "<text>a</text>", "not JSON", (_PLAIN,)),
    BadLine("a comment", "// a comment", "not JSON", (_PLAIN,)),
    BadLine("a comment behind", '{"text": "a"} # why', "not JSON", ("Extra data",)),
    BadLine("a comma too many", '{"text": "a",}', "not JSON", ("at column",)),
    BadLine("no colon", '{"text" "a"}', "not JSON", ("Expecting ':' delimiter",)),
    BadLine("no value", '{"text": }', "not JSON", ("Expecting value",)),
    BadLine("a key without quotes", '{text: "a"}', "not JSON", ("property name",)),
    BadLine("Python's None", '{"text": None}', "not JSON", ("Expecting value",)),
    BadLine("Python's True", '{"text": True}', "not JSON", ("Expecting value",)),
    BadLine("a raw tab in a string", '{"text": "a\tb"}', "not JSON", ("Invalid control character",)),
    BadLine("a raw NUL in a string", '{"text": "a\x00b"}', "not JSON", ("Invalid control character",)),
    BadLine("NUL bytes alone", "\x00\x00\x00", "not JSON", (_PLAIN,)),
    BadLine("an escape that is none", '{"text": "\\x41"}', "not JSON", ("Invalid \\escape",)),
    BadLine("half a unicode escape", '{"text": "\\u00"}', "not JSON", ("escape",)),
    BadLine("NaN", '{"text": NaN}', "not JSON", ("holds NaN", "text only")),
    BadLine("Infinity", '{"text": Infinity}', "not JSON", ("holds Infinity",)),
    BadLine("-Infinity", '{"text": -Infinity}', "not JSON", ("holds -Infinity",)),
    BadLine("a hexadecimal number", '{"text": 0x10}', "not JSON", ("delimiter",)),
    BadLine("a number with a plus", '{"text": +1}', "not JSON", ("Expecting value",)),
    BadLine("a number of 5,000 digits", '{"text": ' + "9" * 5000 + "}", "not JSON", ("number that is too long",)),
    BadLine("nested 100,000 deep", "[" * 100_000, "not JSON", ("nested too deeply", "flat object")),
    BadLine("objects nested 100,000 deep", '{"a":' * 100_000, "not JSON", ("nested too deeply",)),
    BadLine("a key twice", '{"text": "a", "text": "b"}', "not JSON", ("the key 'text' twice", "remove one")),
    BadLine("a key twice in a message", chat('{"role": "user", "role": "assistant", "content": "a"}'), "not JSON",
            ("the key 'role' twice",), CHAT),
    BadLine("a byte order mark in the middle", "\ufeff" + TEXT, "not JSON", (_PLAIN,)),
    BadLine("a sample cut by a full disk", CHAT[:40], "not JSON", ("at column",), CHAT),
    BadLine("two samples without a line break", CHAT + CHAT, "not JSON", ("Extra data",), CHAT),
]  # fmt: skip

ENCODING = [
    BadLine("Latin-1", b'{"text": "caf\xe9"}', "encoding", ("byte 0xe9 at 14 is not UTF-8", "save the file as UTF-8")),
    BadLine("Windows-1252 quotes", b'{"text": "\x93a\x94"}', "encoding", ("byte 0x93 at 11",)),
    BadLine("a lone continuation byte", b'{"text": "\x80"}', "encoding", ("byte 0x80",)),
    BadLine("a truncated character", b'{"text": "\xe2\x82"}', "encoding", ("byte 0xe2",)),
    BadLine("an overlong slash", b'{"text": "\xc0\xaf"}', "encoding", ("byte 0xc0",)),
    BadLine("a surrogate in bytes", b'{"text": "\xed\xa0\x80"}', "encoding", ("byte 0xed",)),
    BadLine("beyond Unicode", b'{"text": "\xf5\x80\x80\x80"}', "encoding", ("byte 0xf5",)),
    BadLine("UTF-16 in the middle", '{"text": "a"}'.encode("utf-16"), "encoding", ("is not UTF-8",)),
    BadLine("a compressed block", b"\x1f\x8b\x08\x00\xff\xfe", "encoding", ("byte 0x8b",)),
    BadLine("half a surrogate pair", '{"text": "\\ud800"}', "encoding", ("half a surrogate pair", "whole")),
    BadLine("the other half", '{"text": "a\\udc00"}', "encoding", ("half a surrogate pair at 2",)),
    BadLine("half a pair in a message", chat('{"role": "assistant", "content": "\\ud83d"}'), "encoding",
            ("messages[1].content", "half a surrogate"), CHAT),
    BadLine("half a pair in a call", calling('[{"function": {"name": "f", "arguments": {"x": "\\ud83d"}}}]'),
            "encoding", ("tool_calls[0]", "half a surrogate"), CHAT),
    BadLine("half a pair in a tool", with_tools('[{"function": {"name": "f", "description": "\\ud83d"}}]'), "encoding",
            ("tools[0]", "half a surrogate"), CHAT),
]  # fmt: skip

KEYS = [
    BadLine("text alone", '"text"', "not an object", ("is text, not an object", "one object a line")),
    BadLine("a list", "[1]", "not an object", ("is a list, not an object",)),
    BadLine("a list of samples", f"[{TEXT}, {TEXT}]", "not an object", ("is a list, not an object",)),
    BadLine("a number", "17", "not an object", ("is a number, not an object",)),
    BadLine("null", "null", "not an object", ("is null, not an object",)),
    BadLine("true", "true", "not an object", ("is true or false, not an object",)),
    BadLine("an empty object", "{}", "wrong keys", ("is an empty object", "a sample is one of")),
    BadLine("a misspelt key", '{"txt": "a"}', "wrong keys", ("unknown key 'txt'", "did you mean 'text'?")),
    BadLine("a capital letter", '{"Text": "a"}', "wrong keys", ("unknown key 'Text'", "did you mean 'text'?")),
    BadLine("a key with a blank", '{"text ": "a"}', "wrong keys", ("unknown key 'text '",)),
    BadLine("a call of ShareGPT", '{"conversations": [{"from": "function_call", "value": "{}"}]}', "messages",
            ("conversations[0] is from 'function_call'", "write them as tool_calls")),
    BadLine("a list for a speaker", '{"conversations": [{"from": ["human"], "value": "a"}]}', "messages",
            ("conversations[0] is from ['human']",)),
    BadLine("a history that is text", '{"instruction": "a", "output": "b", "history": "c"}', "messages",
            ("'history' is no list of pairs",)),
    BadLine("half a pair of history", '{"instruction": "a", "output": "b", "history": [["c"]]}', "messages",
            ("'history' is no list of pairs",)),
    BadLine("a preference", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "wrong keys",
            ("is a preference", "qlora-lowmem data convert FILE OUT.jsonl --completion chosen"), PAIR),
    BadLine("a misspelt key beside", '{"text": "a", "tolls": []}', "wrong keys", ("did you mean 'tools'?",)),
    BadLine("message for messages", '{"message": []}', "wrong keys", ("did you mean 'messages'?",)),
    BadLine("question and answer", '{"question": "a", "answer": "b"}', "wrong keys", ("'question', 'answer'",)),
    BadLine("response for completion", '{"prompt": "a", "response": "b"}', "wrong keys", ("'response'",), PAIR),
    BadLine("no completion", '{"prompt": "a"}', "wrong keys", ("has 'prompt' but no 'completion'", "add it"), PAIR),
    BadLine("no prompt", '{"completion": "a"}', "wrong keys", ("has 'completion' but no 'prompt'", "add it"), PAIR),
    BadLine("text and prompt", '{"text": "a", "prompt": "b"}', "wrong keys", ("mixes 'prompt' and 'text'",)),
    BadLine("messages and text", f'{{"messages": [{USER}], "text": "a"}}', "wrong keys", ("mixes 'messages' and",)),
    BadLine("text and tools", f'{{"text": "a", "tools": [{TOOL}]}}', "wrong keys", ("'tools' beside 'text'",)),
    BadLine("tools alone", f'{{"tools": [{TOOL}]}}', "wrong keys", ("'tools' but no 'messages'",), CHAT),
    BadLine("two texts and tools", f'{{"prompt": "a", "completion": "b", "tools": [{TOOL}]}}', "wrong keys",
            ("tools need lists of messages",), PAIR),
    BadLine("tool for tools", f'{{"messages": [{USER}, {ANSWER}], "tool": []}}', "wrong keys",
            ("unknown key 'tool'", "did you mean 'tools'?"), CHAT),
    BadLine("the samples under a key", f'{{"data": [{TEXT}]}}', "wrong keys", ("unknown key 'data'",)),
]  # fmt: skip

VALUES = [
    BadLine("an empty text", '{"text": ""}', "empty", ("'text' is empty", "write it or remove the line")),
    BadLine("blanks", '{"text": "  "}', "empty", ("'text' is empty",)),
    BadLine("line breaks", '{"text": "\\n\\t"}', "empty", ("'text' is empty",)),
    BadLine("wide blanks", '{"text": "\\u3000\\u00a0"}', "empty", ("'text' is empty",)),
    BadLine("a number", '{"text": 3}', "wrong type", ("'text' is a number, not text", "write it as text")),
    BadLine("a fraction", '{"text": 1e3}', "wrong type", ("'text' is a number",)),
    BadLine("null", '{"text": null}', "wrong type", ("'text' is null, not text",)),
    BadLine("false", '{"text": false}', "wrong type", ("'text' is true or false",)),
    BadLine("a list of texts", '{"text": ["a"]}', "wrong type", ("'text' is a list",)),
    BadLine("an object", '{"text": {"a": 1}}', "wrong type", ("'text' is an object",)),
    BadLine("an empty prompt", '{"prompt": "", "completion": "b"}', "empty", ("'prompt' is empty",), PAIR),
    BadLine("an empty completion", '{"prompt": "a", "completion": ""}', "empty", ("'completion' is empty",), PAIR),
    BadLine("true for a completion", '{"prompt": "a", "completion": true}', "wrong type",
            ("'completion' is true or false, not text",), PAIR),
    BadLine("null for a prompt", '{"prompt": null, "completion": "b"}', "wrong type", ("'prompt' is null",), PAIR),
    BadLine("an object for a prompt", f'{{"prompt": {USER}, "completion": "b"}}', "wrong type",
            ("'prompt' is an object",), PAIR),
    BadLine("text and messages", f'{{"prompt": "a", "completion": [{ANSWER}]}}', "wrong type",
            ("'prompt' is text but 'completion' is a list", "write two texts"), PAIR),
    BadLine("messages and text", f'{{"prompt": [{USER}], "completion": "b"}}', "wrong type",
            ("'prompt' is a list but 'completion' is text",), PAIR),
    BadLine("no answer to learn", f'{{"prompt": [{USER}], "completion": [{USER}]}}', "nothing to learn",
            ("'completion' has no assistant message", "add the answer"), CHAT_PAIR),
    BadLine("an empty completion list", f'{{"prompt": [{USER}], "completion": []}}', "empty",
            ("'completion' is an empty list",)),
    BadLine("an empty prompt list", f'{{"prompt": [], "completion": [{ANSWER}]}}', "empty", ("'prompt' is an empty",)),
    BadLine("texts in a list", '{"prompt": ["a"], "completion": ["b"]}', "messages", ("prompt[0] is text",)),
]  # fmt: skip

MESSAGES = [
    BadLine("text", '{"messages": "a"}', "messages", ("'messages' is text, not a list", '[{"role": "user"')),
    BadLine("one message", f'{{"messages": {USER}}}', "messages", ("'messages' is an object, not a list",)),
    BadLine("null", '{"messages": null}', "messages", ("'messages' is null",)),
    BadLine("a number", '{"messages": 3}', "messages", ("'messages' is a number",)),
    BadLine("messages in a text", '{"messages": "[{\\"role\\": \\"user\\"}]"}', "messages", ("'messages' is text",)),
    BadLine("an empty list", '{"messages": []}', "empty", ("'messages' is an empty list", "at least one")),
    BadLine("a text in the list", '{"messages": ["a"]}', "messages", ("messages[0] is text, not a message",)),
    BadLine("a null in the list", chat("null"), "messages", ("messages[1] is null, not a message",)),
    BadLine("a list in the list", f'{{"messages": [[{USER}, {ANSWER}]]}}', "messages", ("messages[0] is a list",)),
    BadLine("no role", chat('{"content": "a"}'), "messages", ("messages[1] has no 'role'",)),
    BadLine("no content", chat('{"role": "assistant"}'), "messages", ("messages[1] has no 'content'",)),
    BadLine("an empty message", chat("{}"), "messages", ("messages[1] has no 'role'",)),
    BadLine("an unknown role", chat('{"role": "bot", "content": "a"}'), "messages",
            ("has the role 'bot'", "allowed: system, user, assistant, tool")),
    BadLine("a capital role", chat('{"role": "User", "content": "a"}'), "messages", ("has the role 'User'",)),
    BadLine("the role human", chat('{"role": "human", "content": "a"}'), "messages", ("has the role 'human'",)),
    BadLine("an empty role", chat('{"role": "", "content": "a"}'), "messages", ("has the role ''",)),
    BadLine("a null role", chat('{"role": null, "content": "a"}'), "messages", ("has the role None",)),
    BadLine("a list for a role", chat('{"role": ["user"], "content": "a"}'), "messages", ("has the role ['user']",)),
    BadLine("an empty content", chat('{"role": "assistant", "content": ""}'), "empty",
            ("messages[1].content' is empty",)),
    BadLine("a null content", chat('{"role": "assistant", "content": null}'), "wrong type", ("content' is null",)),
    BadLine("a number for content", chat('{"role": "assistant", "content": 4}'), "wrong type",
            ("is a number, not text",)),
    BadLine("a key too many", chat('{"role": "user", "content": "a", "weight": 1}'), "messages",
            ("unknown key 'weight'", "remove it")),
    BadLine("a weight of 2", chat('{"role": "assistant", "content": "a", "weight": 2}'), "messages",
            ("messages[1].weight is 2; allowed: 0 and 1",), CHAT),
    BadLine("context alone", chat('{"role": "assistant", "content": "a", "weight": 0}'), "nothing to learn",
            ("no assistant message",), CHAT),
    BadLine("a picture among the parts",
            chat('{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}'), "wrong type",
            ("messages[1].content' is a list, not text",), CHAT),
    BadLine("a name of a user", chat('{"role": "user", "content": "a", "name": "b"}'), "messages",
            ("unknown key 'name'", "belongs to the role 'tool'")),
    BadLine("a user who calls", chat(f'{{"role": "user", "content": "a", "tool_calls": [{CALL}]}}'), "messages",
            ("unknown key 'tool_calls'", "belongs to the role 'assistant'")),
    BadLine("contents", chat('{"role": "user", "content": "a", "contents": "b"}'), "messages",
            ("did you mean 'content'?",)),
    BadLine("a tool without content", chat('{"role": "tool", "name": "f"}'), "messages", ("has no 'content'",)),
    BadLine("a tool with an empty name", chat('{"role": "tool", "name": "", "content": "1"}'), "empty",
            (".name' is empty",)),
    BadLine("a number for a call's id", chat('{"role": "tool", "tool_call_id": 7, "content": "1"}'), "wrong type",
            ("tool_call_id' is a number",)),
    BadLine("nobody answers", f'{{"messages": [{USER}]}}', "nothing to learn",
            ("no assistant message", "--train-on all")),
    BadLine("text in a file of messages", TEXT, "mixed formats", ("holds text, but line 1 holds messages",)),
    BadLine("a pair in a file of messages", PAIR, "mixed formats", ("holds prompt/completion texts",)),
]  # fmt: skip

TOOLS = [
    BadLine("calls that are no list", calling(CALL), "tools", ("tool_calls' is an object, not a list of calls",)),
    BadLine("calls in a text", calling('"f(1)"'), "tools", ("tool_calls' is text",)),
    BadLine("no calls and no words", calling("[]"), "empty", ("messages[1].content' is empty",)),
    BadLine("a number for calls", calling("3"), "tools", ("tool_calls' is a number, not a list of calls",)),
    BadLine("a call in a text", calling('["f"]'), "tools", ("tool_calls[0]' is text, not an object",)),
    BadLine("a flat call", calling('[{"name": "f", "arguments": {}}]'), "tools", ("has no 'function'",)),
    BadLine("a text for a function", calling('[{"function": "f"}]'), "tools", ("a 'function' that is text",)),
    BadLine("a call without a name", calling('[{"function": {"arguments": {}}}]'), "tools", ("has no name",)),
    BadLine("a call with an empty name", calling('[{"function": {"name": " "}}]'), "tools", ("has no name",)),
    BadLine("a call of another type", calling('[{"type": "code", "function": {"name": "f"}}]'), "tools", ("'code'",)),
    BadLine("a list of arguments", calling('[{"function": {"name": "f", "arguments": [1]}}]'), "tools",
            ("arguments' is a list, not an object",)),
    BadLine("arguments that are no JSON", calling('[{"function": {"name": "f", "arguments": "x=1"}}]'), "tools",
            ("is text that is not JSON",)),
    BadLine("arguments that are a number", calling('[{"function": {"name": "f", "arguments": "7"}}]'), "tools",
            ("arguments' is a number",)),
    BadLine("NaN in arguments", calling('[{"function": {"name": "f", "arguments": "{\\"x\\": NaN}"}}]'), "tools",
            ("is text that is not JSON",)),
    BadLine("tools that are no list", with_tools(TOOL), "tools", ("'tools' is an object, not a list of tools",)),
    BadLine("an empty object for tools", with_tools("{}"), "tools", ("'tools' is an object, not a list of tools",)),
    BadLine("true for tools", with_tools("true"), "tools", ("'tools' is true or false",)),
    BadLine("a tool's name alone", with_tools('["f"]'), "tools", ("'tools[0]' is text",)),
    BadLine("a tool without a function", with_tools('[{"type": "function"}]'), "tools", ("has no 'function'",)),
    BadLine("a tool without a name", with_tools('[{"function": {"description": "d"}}]'), "tools", ("has no name",)),
    BadLine("a second tool that is none", with_tools(f"[{TOOL}, 3]"), "tools", ("'tools[1]' is a number",)),
    BadLine("parameters that are no schema", with_tools('[{"function": {"name": "f", "parameters": []}}]'), "tools",
            ("parameters' is a list, not a JSON schema",)),
    BadLine("tools in a text that is no JSON", with_tools('"f, g"'), "tools", ("is text that is not JSON",)),
    BadLine("tools of another type", with_tools('[{"type": "retrieval", "function": {"name": "f"}}]'), "tools",
            ("'retrieval'", "only 'function'")),
]  # fmt: skip

BAD_LINES = [
    *NOT_JSON,
    *ENCODING,
    *KEYS,
    *VALUES,
    *(case._replace(first=CHAT) for case in MESSAGES),
    *(case._replace(first=CHAT) for case in TOOLS),
]


class BadFile(NamedTuple):
    """A whole file that is refused."""

    name: str
    content: bytes
    says: tuple[str, ...]


BAD_FILES = [
    BadFile("empty", b"", ("no samples (0 lines)", _PLAIN)),
    BadFile("blank lines only", b"\n \n\n", ("no samples (3 lines, all blank)",)),
    BadFile("a byte order mark alone", b"\xef\xbb\xbf", ("no samples",)),
    BadFile("UTF-16", TEXT.encode("utf-16"), (":1: is UTF-16", "save the file as UTF-8")),
    BadFile("UTF-16, big end first", "\ufeff".encode("utf-16-be") + TEXT.encode("utf-16-be"), (":1: is UTF-16",)),
    BadFile("UTF-32", TEXT.encode("utf-32"), (":1: ",)),
    BadFile("gzip", b"\x1f\x8b\x08\x08\x00\x00\x00\x00\xff", (":1: byte 0x8b at 2 is not UTF-8",)),
    BadFile("a Parquet file under a wrong name", b"PAR1\x15\x04\x15\x80PAR1", (":1: ",)),
    BadFile(
        "one JSON list", f"[\n{TEXT},\n{TEXT}\n]\n".encode(), (":1: is not JSON", "no brackets", "3 faults in 4 lines")
    ),
    BadFile("pretty-printed", b'{\n  "text": "a"\n}\n', (":1: is not JSON", _ONE_LINE, ":2: ", ":3: ")),
    BadFile("old Mac line ends", f"{TEXT}\r{TEXT}\r".encode(), (":1: is not JSON: Extra data",)),
    BadFile("two formats", f"{TEXT}\n{PAIR}\n".encode(), (":2: holds prompt/completion texts, but line 1 holds text",)),
    BadFile(
        "two kinds of pairs",
        f"{CHAT_PAIR}\n{PAIR}\n".encode(),
        (":2: holds prompt/completion texts, but line 1 holds prompt/completion messages",),
    ),
    BadFile("the last line cut off", f"{TEXT}\n{TEXT}\n{TEXT[:9]}".encode(), (":3: is not JSON",)),
    BadFile("only the fault is sound elsewhere", f"{TEXT}\nx\n{TEXT}\n".encode(), ("1 fault in 3 lines (1 not JSON)",)),
]


class BadRow(NamedTuple):
    """The second row of a Parquet table that is refused, after a sound first one."""

    name: str
    columns: dict[str, list[Any]]
    says: tuple[str, ...]


_MESSAGE = {"role": "user", "content": "a"}
_REPLY = {"role": "assistant", "content": "b"}

BAD_ROWS = [
    BadRow("a null text", {"text": ["a", None]}, ("row 2: 'text' is null",)),
    BadRow("an empty text", {"text": ["a", ""]}, ("row 2: 'text' is empty",)),
    BadRow("blanks", {"text": ["a", " \n"]}, ("row 2: 'text' is empty",)),
    BadRow("numbers", {"text": [1, 2]}, ("row 1: 'text' is a number", "row 2: 'text' is a number")),
    BadRow("lists", {"text": [["a"], ["b"]]}, ("row 1: 'text' is a list",)),
    BadRow("bytes", {"text": [b"a", b"b"]}, ("row 1: 'text' is bytes",)),
    BadRow("booleans", {"text": [True, False]}, ("row 1: 'text' is true or false",)),
    BadRow("a null prompt", {"prompt": ["a", None], "completion": ["b", "b"]}, ("row 2: 'prompt' is null",)),
    BadRow("an empty completion", {"prompt": ["a", "a"], "completion": ["b", ""]}, ("row 2: 'completion' is empty",)),
    BadRow("null messages", {"messages": [[_MESSAGE, _REPLY], None]}, ("row 2: 'messages' is null",)),
    BadRow("no messages", {"messages": [[_MESSAGE, _REPLY], []]}, ("row 2: 'messages' is an empty list",)),
    BadRow("nobody answers", {"messages": [[_MESSAGE, _REPLY], [_MESSAGE]]}, ("row 2: has no assistant message",)),
    BadRow(
        "a null content",
        {"messages": [[_MESSAGE, _REPLY], [_MESSAGE, {"role": "assistant", "content": None}]]},
        ("row 2: messages[1] has no 'content'",),
    ),
    BadRow(
        "an unknown role",
        {"messages": [[_MESSAGE, _REPLY], [_MESSAGE, {"role": "gpt", "content": "a"}]]},
        ("row 2: messages[1] has the role 'gpt'",),
    ),
    BadRow(
        "tools that are no JSON",
        {"messages": [[_MESSAGE, _REPLY], [_MESSAGE, _REPLY]], "tools": [None, "f()"]},
        ("row 2: 'tools' is text that is not JSON",),
    ),
    BadRow("columns of no format", {"question": ["a"], "answer": ["b"]}, ("its columns (question, answer)", "rename")),
    BadRow("no rows", {"text": []}, ("no samples (0 rows)",)),
]
