"""What a model says without its adapter and with it: one base in memory, the adapter switched off and on."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_lowmem.data import CheckedData
from qlora_lowmem.errors import DoesNotFitError, UsageError
from qlora_lowmem.models.adapter_files import ADAPTER_ADVICE, check_adapter_files
from qlora_lowmem.models.limits import Limits, with_padding
from qlora_lowmem.models.loading import assert_on_device, choose_precision, load_base, load_tokenizer, skeleton
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.job import apply_memory_limit, device_of, start_recorder
from qlora_lowmem.run.out_of_memory import first_words, whose_memory
from qlora_lowmem.tokens.dataset import encoded_samples
from qlora_lowmem.tokens.encoding import NO_LOSS, Encoded
from qlora_lowmem.tokens.store import TokenTally
from qlora_lowmem.tokens.templates import TEMPLATE_ERRORS, check_templates

# What an adapter of another model, or a file that is no adapter, provokes in PEFT.
_UNSUITABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
# Positions whose logits exist at once: 512 x 100,352 words are 196 MiB in fp32.
_SCORED_AT_ONCE = 512


@dataclass(frozen=True)
class Answer:
    """The greedy continuation of a prompt, without the adapter and with it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss on samples that were not trained on.

    Attributes:
        samples: how many.
        scored_tokens: tokens with a loss, over which the means are.
        before, after: mean cross-entropy in nats a token, without the adapter and with it.
    """

    samples: int
    scored_tokens: int
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the perplexities."""
        losses = {"before": self.before, "after": self.after}
        figures = {name: {"loss": loss, "perplexity": math.exp(loss)} for name, loss in losses.items()}
        return {"samples": self.samples, "scored_tokens": self.scored_tokens, **figures}


@dataclass(frozen=True)
class Adapted:
    """A base model on its device, with an adapter that can be switched off.

    Attributes:
        own: in host memory, weights of the base that loading the adapter has replaced, by their names in it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    limits: Limits
    own: dict[str, torch.Tensor]

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The base model as it was."""
        weights = {name: self.model.get_base_model().get_parameter(name) for name in self.own}
        trained = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        with self.model.disable_adapter(), torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.own[name])
            try:
                yield
            finally:
                for name, weight in weights.items():
                    weight.copy_(trained[name])


def load_adapted(recipe: Recipe, adapter: Path) -> Adapted:
    """The recipe's base, in 4 bits as it was trained on, and the adapter in a folder, from safetensors.

    Raises:
        UsageError: a model or an adapter that is not there, or that do not go together.
        DoesNotFitError: out of GPU memory.
    """
    files = check_adapter_files(adapter, recipe)
    modules = files.modules
    source = source_of(recipe)
    if recipe.run.device != "cpu":
        apply_memory_limit(recipe, start_recorder(recipe))
    device, supports_bf16 = device_of(recipe)
    precision = choose_precision(recipe, device.type, supports_bf16)
    tokenizer, limits = with_padding(load_tokenizer(recipe, source)), Limits.of(skeleton(recipe, source))
    check_templates(tokenizer, recipe.base.model)
    transformers.set_seed(recipe.schedule.seed)  # random weights are those of the training
    with _fits("loading"):
        base = load_base(recipe, source, precision.compute, device)
        try:
            own = {name: base.get_parameter(name).detach().cpu().clone() for name in files.whole}
            model = PeftModel.from_pretrained(base, str(adapter))
        except (*_UNSUITABLE, RuntimeError, MemoryError) as error:
            if whose_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"the adapter in {str(adapter)!r} cannot be put on {recipe.base.model!r} ({reason}); give the folder "
                "of a run of this recipe"
            ) from error
    made = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    if made != modules.keys():
        strays = sorted(made ^ modules.keys())
        raise UsageError(
            f"the adapter in {str(adapter)!r} has weights for {len(modules)} modules, and its adapter_config.json "
            f"adapts {len(made)}: {', '.join(strays[:3])} on one side only. {ADAPTER_ADVICE}"
        )
    assert_on_device(model, device)
    model.eval()
    return Adapted(model, tokenizer, device, limits, own)


def answer(
    adapted: Adapted, prompts: Sequence[str], max_new_tokens: int, template: str, *, quiet: bool = True
) -> list[Answer]:
    """Greedy continuations of each prompt, put as the run's `template` puts samples: the same words every time.

    Raises:
        DoesNotFitError: out of GPU memory.
    """
    found = []
    with _fits("generating"):
        for prompt in tqdm(prompts, desc="answering", unit="prompt", delay=2, disable=quiet):
            asked = _asked(adapted, prompt, template)
            name, last = "the base model", int(asked.max())
            adapted.limits.check_token(last, adapted.tokenizer, name, f"makes of {prompt!r}")
            adapted.limits.check_length(asked.shape[1] + max_new_tokens, name, "--prompt and --max-new-tokens")
            with adapted.switched_off():
                before = _continuation(adapted, asked, max_new_tokens)
            found.append(Answer(prompt, before, _continuation(adapted, asked, max_new_tokens)))
    return found


def held_out_loss(adapted: Adapted, recipe: Recipe, checked: CheckedData, samples: int) -> HeldOutLoss:
    """The mean loss of the first `samples` samples, tokenised, cut and scored as in training.

    Raises:
        UsageError: they do not go with the chat template, or nothing of them has a loss.
        DoesNotFitError: out of GPU memory.
    """
    tally = TokenTally(recipe.batch.max_seq_length)
    chosen = list(tally.cut(encoded_samples(recipe, checked, adapted.tokenizer, samples)))
    if not chosen:
        raise UsageError(f"--data: no sample of {checked.report.name} has a loss within max_seq_length")
    largest = max(token for sample in chosen for token in sample.ids)
    adapted.limits.check_token(largest, adapted.tokenizer, recipe.base.model, f"makes of {checked.report.name}")
    before = after = 0.0
    with _fits("evaluating"), torch.inference_mode():
        for sample in tqdm(chosen, desc="evaluating", unit="sample", delay=2, disable=checked.quiet):
            with adapted.switched_off():
                before += _loss(adapted, sample)
            after += _loss(adapted, sample)
    scored = sum(len(_scored(sample)) for sample in chosen)
    return HeldOutLoss(len(chosen), scored, before / scored, after / scored)


def _loss(adapted: Adapted, sample: Encoded) -> float:
    """The summed cross-entropy of a sample's scored tokens, with logits at the positions before them only."""
    ids = torch.tensor([sample.ids], device=adapted.device)
    total = 0.0
    for positions in torch.tensor(_scored(sample), device=adapted.device).split(_SCORED_AT_ONCE):
        logits = adapted.model(input_ids=ids, logits_to_keep=positions - 1, use_cache=False).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits.float(), ids[0, positions], reduction="sum"))
    return total


def _scored(sample: Encoded) -> list[int]:
    """Positions of tokens with a loss; the first token is predicted from nothing."""
    return [place for place, label in enumerate(sample.labels) if place and label != NO_LOSS]


def _asked(adapted: Adapted, prompt: str, template: str) -> torch.Tensor:
    """The prompt's tokens, (1, seq): a user's message where the model has a chat template and the run used it."""
    tokenizer = adapted.tokenizer
    if template == "none" or not tokenizer.chat_template:
        return torch.tensor([tokenizer(text=prompt)["input_ids"]], device=adapted.device)
    message = [{"role": "user", "content": prompt}]
    try:
        found: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    except TEMPLATE_ERRORS as error:
        raise UsageError(f"--prompt: the model's chat template refuses {prompt!r}: {error}") from None
    return torch.tensor([found["input_ids"]], device=adapted.device)


def _continuation(adapted: Adapted, asked: torch.Tensor, max_new_tokens: int) -> str:
    tokenizer = adapted.tokenizer
    more = adapted.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])} - {None}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        said: Any = adapted.model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), generation_config=config
        )
    return str(tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)).strip()


@contextlib.contextmanager
def _fits(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        whose = whose_memory(error)
        if whose is None:
            raise
        other = ", and --device cpu none" if whose == "card" else "; or end other programs"
        raise DoesNotFitError(
            f"out of {'GPU' if whose == 'card' else 'host'} memory while {what}: {first_words(error)}. Shorter samples "
            f"and prompts need less{other}"
        ) from error
