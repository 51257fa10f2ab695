"""A sample as token ids and labels, as TRL's `SFTTrainer` makes them; every token is made once."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from qlora_lowmem.data import FaultySampleError
from qlora_lowmem.tokens.templates import TEMPLATE_ERRORS, Marking

NO_LOSS = -100


class Encoded(NamedTuple):
    """A sample's tokens, and the same as labels: `NO_LOSS` where there is no loss."""

    ids: list[int]
    labels: list[int]


class Encoder:
    """Samples of one format and one marking, to tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marking: Marking) -> None:
        self._tokenizer = tokenizer
        self._marking = marking

    def encode(self, sample: dict[str, Any]) -> Encoded:
        """The tokens of a checked sample, at whatever length they have.

        Raises:
            FaultySampleError: the chat template refuses it, or cannot say which tokens are the assistant's.
        """
        try:
            if "text" in sample:
                ids = self._ids(self._ended(sample["text"]))
                return Encoded(ids, ids)
            if "prompt" in sample:
                return self._pair(sample)
            return self._conversation(sample["messages"], sample.get("tools"))
        except TEMPLATE_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FaultySampleError("chat template", f"the model's chat template refuses it: {reason}") from None

    def _pair(self, sample: dict[str, Any]) -> Encoded:
        prompt, completion, tools = sample["prompt"], sample["completion"], sample.get("tools")
        if self._marking.turns:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._conversation(turns, tools)
        if isinstance(prompt, str):
            before, ids = self._ids(prompt), self._ids(prompt + self._ended(completion))
        else:
            before, ids = self._rendered(prompt, tools, answer=True), self._rendered([*prompt, *completion], tools)
        if self._marking.method == "all":
            return Encoded(ids, ids)
        start = common_prefix_length(before, ids)
        return Encoded(ids, [NO_LOSS] * start + ids[start:])

    def _conversation(self, messages: list[dict[str, Any]], tools: Any) -> Encoded:
        context = [index for index, message in enumerate(messages) if "weight" in message]
        messages = [{key: each for key, each in message.items() if key != "weight"} for message in messages]
        ids, labels = self._scored(messages, tools, context)
        for index in context:  # marks and `all` know nothing of weights
            if self._marking.method != "prefixes":
                start, end = self._turn(messages, index, tools, ids)
                labels = [*labels[:start], *[NO_LOSS] * (end - start), *labels[end:]]
        return Encoded(ids, labels)

    def _scored(self, messages: list[dict[str, Any]], tools: Any, context: list[int]) -> Encoded:
        """The conversation with the loss that the marking says; with `prefixes`, none on the turns in `context`."""
        if self._marking.method == "marks":
            found = self._template(messages, tools, return_assistant_tokens_mask=True)
            ids, mask = list(found["input_ids"]), found["assistant_masks"]
            if 1 not in mask:
                reason = "the model's chat template marks no word of it as the assistant's"
                raise FaultySampleError("chat template", reason)
            return Encoded(ids, [token if marked else NO_LOSS for token, marked in zip(ids, mask, strict=True)])
        ids = self._rendered(messages, tools)
        if self._marking.method == "all":
            return Encoded(ids, ids)
        labels = [NO_LOSS] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index not in context:
                start, end = self._turn(messages, index, tools, ids)
                labels[start:end] = ids[start:end]
        return Encoded(ids, labels)

    def _turn(self, messages: list[dict[str, Any]], index: int, tools: Any, ids: list[int]) -> tuple[int, int]:
        """Where the tokens of the assistant's message `index` begin and end in `ids`, the whole conversation."""
        if index == 0:
            raise FaultySampleError(
                "chat template",
                "begins with the assistant, whose words the model's chat template does not mark; begin with a user's "
                "message, or set data.train_on to 'all'",
            )
        start = common_prefix_length(self._rendered(messages[:index], tools, answer=True), ids)
        if index == len(messages) - 1:
            return start, len(ids)
        through = self._rendered(messages[: index + 1], tools)
        end = common_prefix_length(through, ids)
        if end < len(through):
            raise FaultySampleError(
                "chat template",
                f"messages[{index}] is rendered differently once more follow, and the model's chat template does not "
                "mark the assistant's words; end the sample there, or set data.train_on to 'all'",
            )
        return start, end

    def _ended(self, text: str) -> str:
        end = str(self._tokenizer.eos_token or "")
        return text if text.endswith(end) else text + end

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text=text)["input_ids"])

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, *, answer: bool = False) -> list[int]:
        """The tokens of messages; with `answer`, up to where the assistant's answer begins."""
        return list(self._template(messages, tools, add_generation_prompt=answer)["input_ids"])

    def _template(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
        template = self._marking.template
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, return_dict=True, **options
        )
