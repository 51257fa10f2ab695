"""Chat templates: hostile ones are refused, and what they show and mark is known before anything loads."""

import json
from functools import partial
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.data import DataReport, check_data
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.tokens.templates import Marking, check_templates, choose_marking, end_tokens
from tiny_chat import MARKED, PLAIN, WITH_TOOLS, tiny_tokenizer, write_tiny_chat

main = partial(run_command, "train")

HOSTILE = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ [messages] | map(attribute='__class__') | list }}",
    "{% set x = cycler.__init__.__globals__ %}{{ x }}",
    "{% for message in messages %}{{ message.content }}{{ raise_exception.__globals__.os.system('id') }}{% endfor %}",
    PLAIN + "{% macro f(a=''.__class__) %}{% endmacro %}",
    MARKED.replace("{% generation %}", "{% generation %}{{ self.__init__ }}"),
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_leads_out_of_its_sandbox_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"chat template of 'evil/model' reaches for '__\w+__'"):
        check_templates(tiny_tokenizer(template), "evil/model")


def test_what_hides_its_aim_runs_into_the_sandbox(tmp_path: Path) -> None:
    """A name put together while it runs is not seen beforehand; jinja2's sandbox holds, and the sample is refused."""
    template = "{{ (messages | attr('__cla' ~ 'ss__')).__subclasses__ }}"
    hidden = "{{ (messages | attr('__cla' ~ 'ss__')).mro() }}"
    with pytest.raises(UsageError, match="__subclasses__"):
        check_templates(tiny_tokenizer(template), "evil/model")
    check_templates(tiny_tokenizer(hidden), "evil/model")
    folder = write_tiny_chat(tmp_path / "model", hidden)
    arguments = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder), "--dry-run"]
    assert main(arguments) == 2


def test_the_command_refuses_a_hostile_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proof = tmp_path / "ran"
    folder = write_tiny_chat(tmp_path / "model", f"{{{{ ''.__class__.__base__.__subclasses__()[0]('{proof}') }}}}")
    arguments = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder), "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "reaches for '__" in printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    assert not proof.exists()


def test_one_of_several_templates_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": HOSTILE[0]}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="the chat template 'tool_use' of 'evil/model'"):
        check_templates(tokenizer, "evil/model")


def test_a_template_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        check_templates(tiny_tokenizer("{% for %}"), "x/y")


KNOWN = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("file", KNOWN, ids=[file.stem for file in KNOWN])
def test_no_template_of_a_known_model_is_refused(file: Path) -> None:
    check_templates(tiny_tokenizer(file.read_text(encoding="utf-8")), "known")


def report_of(folder: Path, *samples: object) -> DataReport:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return check_data(str(path)).report


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def test_markings(tmp_path: Path) -> None:
    chats = report_of(tmp_path, {"messages": CHAT})
    assert choose_marking(tiny_tokenizer(PLAIN), chats, "completions", "m", "auto") == Marking("prefixes")
    assert choose_marking(tiny_tokenizer(MARKED), chats, "completions", "m", "auto") == Marking("marks")
    assert choose_marking(tiny_tokenizer(MARKED), chats, "all", "m", "auto") == Marking("all")
    texts = report_of(tmp_path, {"text": "a"})
    assert choose_marking(tiny_tokenizer(None), texts, "completions", "m", "auto") == Marking("all")
    pairs = report_of(tmp_path, {"prompt": "a", "completion": "b"})
    assert choose_marking(tiny_tokenizer(None), pairs, "completions", "m", "auto") == Marking("prefixes")
    assert choose_marking(tiny_tokenizer(None), pairs, "all", "m", "auto") == Marking("all")
    assert choose_marking(tiny_tokenizer(PLAIN), pairs, "completions", "m", "auto") == Marking("prefixes", turns=True)
    assert choose_marking(tiny_tokenizer(MARKED), pairs, "completions", "m", "auto") == Marking("marks", turns=True)
    assert choose_marking(tiny_tokenizer(PLAIN), pairs, "completions", "m", "none") == Marking("prefixes")
    assert choose_marking(tiny_tokenizer(PLAIN), texts, "completions", "m", "auto") == Marking("all")


def test_trls_own_version_of_a_known_template_marks(tmp_path: Path) -> None:
    templates = Path(trl.__file__).parent / "chat_templates"
    known = tiny_tokenizer((templates / "qwen3.jinja").read_text(encoding="utf-8"))
    found = choose_marking(known, report_of(tmp_path, {"messages": CHAT}), "completions", "m", "auto")
    assert found == Marking("marks", (templates / "qwen3_training.jinja").read_text(encoding="utf-8"))


def test_conversations_need_a_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        choose_marking(tiny_tokenizer(None), report_of(tmp_path, {"messages": CHAT}), "completions", "m", "auto")


def test_tools_need_a_template_that_shows_them(tmp_path: Path) -> None:
    tools = report_of(tmp_path, {"messages": CHAT, "tools": [TOOL]})
    calls = report_of(tmp_path, {"messages": [CHAT[0], CALLS]})
    for report in (tools, calls):
        choose_marking(tiny_tokenizer(WITH_TOOLS), report, "completions", "m", "auto")
    with pytest.raises(UsageError, match=r"1 samples .* bring tools, and the chat template of 'm' does not show them"):
        choose_marking(tiny_tokenizer(PLAIN), tools, "completions", "m", "auto")
    with pytest.raises(UsageError, match=r"1 samples .* call tools, and the chat template"):
        choose_marking(tiny_tokenizer(PLAIN), calls, "completions", "m", "auto")


def test_tokens_at_which_a_model_stops(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(PLAIN)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [6, 7]}')
    source, file = resolve_model(str(tmp_path), "random"), tmp_path / "generation_config.json"

    def ends() -> frozenset[int]:
        return end_tokens(tokenizer, source.generation_config(), source.text_config)

    assert ends() == {tokenizer.eos_token_id, 6, 7}
    file.write_text('{"eos_token_id": [3, 4]}')
    assert ends() == {tokenizer.eos_token_id, 3, 4}
    file.write_text('{"eos_token_id": 5}')
    assert ends() == {tokenizer.eos_token_id, 5}
    known = resolve_model("smollm2-135m-instruct", "random")
    assert end_tokens(tokenizer, None, known.text_config) == {tokenizer.eos_token_id, known.text_config["eos_token_id"]}


def test_the_tokenizer_comes_back_from_its_folder(tmp_path: Path) -> None:
    """Else the tests above would be of another template than the commands'."""
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_chat(tmp_path))
    assert tokenizer.chat_template == PLAIN
