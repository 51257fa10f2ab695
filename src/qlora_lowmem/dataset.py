"""Samples as the trainer takes them: which of TRL's formats, and on which tokens the loss is."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers

from qlora_lowmem.data import Samples
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe


@dataclass(frozen=True)
class TrainingData:
    """A dataset in one of TRL's formats and the two switches that say where the loss is."""

    dataset: Dataset
    assistant_only_loss: bool = False
    completion_only_loss: bool = False


def synthetic_data(recipe: Recipe, vocabulary: int, samples: int) -> TrainingData:
    """`samples` sequences of exactly `max_seq_length` random tokens, every one of them scored: the worst case."""
    generator = torch.Generator().manual_seed(recipe.schedule.seed)
    size = (samples, recipe.batch.max_seq_length)
    tokens = torch.randint(vocabulary, size, generator=generator).tolist()
    return TrainingData(Dataset.from_dict({"input_ids": tokens, "labels": tokens}))


def training_data(recipe: Recipe, checked: Samples, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Choose TRL's format for checked samples (`data.read_samples`).

    A chat template that marks the assistant's tokens is used as it is. Without such marks, a conversation that ends
    with its only assistant message becomes prompt and completion, which gives the same loss mask.

    Raises:
        UsageError: no chat template; a loss on completions alone that the template cannot mark.
    """
    completions = recipe.data.train_on == "completions"
    samples, sample_format = checked.samples, checked.report.format
    if sample_format == "text":
        return TrainingData(Dataset.from_list(samples))
    conversational = sample_format == "messages" or isinstance(samples[0]["prompt"], list)
    if conversational and not tokenizer.chat_template:
        raise UsageError(
            f"data.data: {recipe.data.data!r} holds conversations, and the tokenizer of {recipe.base.model!r} has no "
            "chat template. Use an instruction-tuned model, or data with 'text'"
        )
    if sample_format == "prompt/completion":
        return TrainingData(Dataset.from_list(samples), completion_only_loss=completions)
    if not completions:
        return TrainingData(Dataset.from_list(samples))
    if has_generation_markers(tokenizer.chat_template):
        return TrainingData(Dataset.from_list(samples), assistant_only_loss=True)
    many = [
        number
        for number, sample in enumerate(samples, start=1)
        if [message["role"] for message in sample["messages"]].count("assistant") != 1
        or sample["messages"][-1]["role"] != "assistant"
    ]
    if many:
        raise UsageError(
            f"data.train_on: 'completions' cannot mask sample {many[0]} ({len(many)} such samples): it has several "
            "assistant messages and the model's chat template does not mark them. Set data.train_on to 'all', or end "
            "each sample with its only assistant message"
        )
    pairs = [{"prompt": sample["messages"][:-1], "completion": sample["messages"][-1:]} for sample in samples]
    return TrainingData(Dataset.from_list(pairs), completion_only_loss=True)


def show_sample(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int = 120) -> str:
    """The first sample as the model sees it; tokens with a loss are between `[[` and `]]`."""
    sample = dataset[0]
    ids, labels = sample["input_ids"][:limit], sample["labels"][:limit]
    pieces: list[str] = []
    run: list[int] = []
    scored = False
    for token, label in [*zip(ids, labels, strict=True), (None, None)]:
        if run and (token is None or (label != -100) != scored):
            text = str(tokenizer.decode(run))
            pieces.append(f"[[{text}]]" if scored else text)
            run = []
        if token is not None:
            scored = label != -100
            run.append(token)
    more = "" if len(sample["input_ids"]) <= limit else f" ... ({len(sample['input_ids'])} tokens)"
    return "".join(pieces) + more
