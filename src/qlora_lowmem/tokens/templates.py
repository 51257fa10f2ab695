"""Chat templates: third-party code, so read before it runs; and what of a conversation they render and mark.

transformers renders templates in jinja2's `ImmutableSandboxedEnvironment`: attributes that lead out of it are undefined
there, so that a template which asks for them may print nothing instead of failing. Here it is refused before that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers, supports_tool_calling

from qlora_lowmem.data import DataReport
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.trusted import read_json

# What rendering a template on unexpected messages raises: jinja2's own, and Python's inside an expression.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError),
)
_PROBE_TOOL = "probe_tool_5d1c"
# jinja2's filters that take the name of an attribute.
_FILTERS_BY_NAME = ("attr", "map", "selectattr", "rejectattr", "groupby", "sort", "unique", "min", "max", "sum")


@dataclass(frozen=True)
class Marking:
    """How the tokens are found that the loss is on.

    Attributes:
        method: `all` of them; those that the template `marks` as the assistant's; `prefixes`: those after what the
            conversation up to the assistant's turn has.
        template: the template that renders; None for the tokenizer's own.
        turns: a pair of texts is a conversation of a user's turn and the assistant's, and marked as one.
    """

    method: Literal["all", "marks", "prefixes"]
    template: str | None = None
    turns: bool = False


def check_templates(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """A `UsageError` where a chat template reaches for Python's internals, or is no template at all."""
    given = tokenizer.chat_template or {}
    for name, template in (given if isinstance(given, dict) else {"": given}).items():
        shown = f"base.model: the chat template{name and f' {name!r}'} of {model!r}"
        try:
            tree = _compile_jinja_template(template).environment.parse(template)
        except TemplateError as error:
            raise UsageError(f"{shown} cannot be read ({error}); repair chat_template.jinja, or remove it") from None
        reached = next(_internals(tree), None)
        if reached is not None:
            raise UsageError(
                f"{shown} reaches for {reached!r}, which leads out of its sandbox. No chat needs that: do not use this "
                "model folder before you know who wrote it; another template goes into chat_template.jinja"
            )


def choose_marking(
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    train_on: Literal["all", "completions"],
    model: str,
    template: Literal["auto", "none"],
) -> Marking:
    """How a data set's tokens are marked, checked against the chat template before any weights load.

    The loss on the assistant's words needs a template that marks them (`{% generation %}`): the model's own, or the one
    that TRL has for it. Without one, an assistant's turn is what follows the conversation before it.

    Args:
        template: of the recipe: whether pairs of texts become turns where there is a chat template.

    Raises:
        UsageError: conversations without a chat template, tools that it does not show.
    """
    pairs = report.format == "prompt/completion"
    turns = pairs and not report.conversational and template == "auto" and bool(tokenizer.chat_template)
    if not (report.conversational or turns):
        return Marking("prefixes" if train_on == "completions" and pairs else "all")
    if not tokenizer.chat_template:
        raise UsageError(
            f"data.data: {report.name} holds conversations, and the tokenizer of {model!r} has no chat template. Use "
            "an instruction-tuned model, or data with 'text'"
        )
    _check_tools(tokenizer, report, model)
    if train_on == "all":
        return Marking("all", turns=turns)
    if pairs and not turns:
        return Marking("prefixes")
    if has_generation_markers(tokenizer.chat_template):
        return Marking("marks", turns=turns)
    try:
        return Marking("marks", get_training_chat_template(tokenizer), turns=turns)
    except TEMPLATE_ERRORS:  # one that TRL has no marked version of, or that fails: then each sample says so
        return Marking("prefixes", turns=turns)


def end_tokens(tokenizer: PreTrainedTokenizerBase, file: Path | None, config: Mapping[str, Any]) -> frozenset[int]:
    """Tokens at which the model stops: the tokenizer's own, and those of its `generation_config.json`.

    Without that file, those of its `config` (transformers' `GenerationConfig.from_model_config`).
    """
    found: list[Any] = [tokenizer.eos_token_id]
    content = config if file is None else read_json(file, "Repair it, or remove it")
    stated = content.get("eos_token_id")
    found += stated if isinstance(stated, list) else [stated]
    return frozenset(token for token in found if isinstance(token, int))


def _check_tools(tokenizer: PreTrainedTokenizerBase, report: DataReport, model: str) -> None:
    if report.with_tool_calls and not supports_tool_calling(tokenizer):
        raise UsageError(
            f"data.data: {report.with_tool_calls} samples of {report.name} call tools, and the chat template of "
            f"{model!r} does not show calls and answers of tools. Use a model made for tools, or leave those samples "
            "out"
        )
    if report.with_tools and not _shows_tools(tokenizer):
        raise UsageError(
            f"data.data: {report.with_tools} samples of {report.name} bring tools, and the chat template of {model!r} "
            "does not show them to the model. Use a model made for tools, or remove 'tools' from the samples"
        )


def _shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    parameters = {"type": "object", "properties": {"word": {"type": "string", "description": "any"}}}
    function = {"name": _PROBE_TOOL, "description": "says a word", "parameters": parameters}
    tools: list[Any] = [{"type": "function", "function": function}]
    try:
        said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tools=tools, tokenize=False)
    except TEMPLATE_ERRORS:
        return False
    return _PROBE_TOOL in str(said)


def _internals(tree: nodes.Node) -> Iterator[str]:
    """Names like `__class__` that a template looks up: as an attribute, as an item, through a filter."""
    looked_up: list[Any] = [node.attr for node in tree.find_all(nodes.Getattr)]
    looked_up += [node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)]
    for node in tree.find_all(nodes.Filter):
        if node.name in _FILTERS_BY_NAME:
            given = [*node.args, *(keyword.value for keyword in node.kwargs)]
            looked_up += [argument.value for argument in given if isinstance(argument, nodes.Const)]
    return (name for name in looked_up if isinstance(name, str) and name.startswith("__"))
