"""What of a recipe a model can take: which modules get an adapter, packed samples, lean's ideas.

Names and presets of modules are resolved against those that the architecture really has.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as refuse_for_mamba
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lowmem.errors import UsageError
from qlora_lowmem.lean import LeanOptions, LeanReport, RefusedOptionError
from qlora_lowmem.models.adapters import becomes_experts
from qlora_lowmem.models.wrappers import language_model_of
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.checks import allowed, field_specs
from qlora_lowmem.recipe.sections import TARGET_PRESETS, Lora

# How attention blocks are called in transformers' models whose class does not end in Attention.
_ATTENTION_BLOCKS = ("self_attn", "self_attention", "attention", "attn")
# Linear modules whose weight a model's code takes past the module, by its model type: 4 bits would be read as numbers,
# and an adapter would never train.
READ_PAST = {
    "dots3_note_text": ("weights_proj",),
    "hy_v4": ("weights_proj",),
    "gemma3n_text": ("prediction_coefs", "correction_coefs"),
    "longcat_flash": ("classifier",),
    "mamba": ("dt_proj",),
}
_QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin")


@dataclass(frozen=True)
class Targets:
    """The resolved target modules."""

    names: tuple[str, ...]  # own names or suffixes (`q_proj`), as `peft.LoraConfig.target_modules` takes them
    modules: tuple[str, ...]  # full names of every module that gets an adapter
    within: str = ""  # the language model's name in a wrapper, whose other parts may have modules of the same names
    notes: tuple[str, ...] = ()  # what a person should know of them


def resolve_targets(model: PreTrainedModel, asked: str | Iterable[str]) -> Targets:
    """Resolve a preset or a list of names against `model` (on any device, `meta` included).

    `attention` is every Linear directly inside an attention block; `attention-qv` its query and value projections;
    `all-linear` every Linear but the LM head. A Linear is what PEFT adapts as one: GPT-2's Conv1D among them; none are
    experts and routers that transformers keeps as plain parameters, names that PEFT takes for those, a Linear that
    gives more than a tensor, and projections that a Mamba layer multiplies with past any adapter.
    Of a wrapper, its language model alone is meant.

    Raises:
        UsageError: a name or preset that matches nothing (PEFT would ignore it silently), listing what would match;
            a name that PEFT takes for a mixture's experts;
            the LM head, which TRL's fused loss reads directly, past any adapter.
    """
    head = model.get_output_embeddings()
    head_leaf = next((own_name(name) for name, module in model.named_modules() if module is head), None)
    within = language_model_of(model)
    linears = [name for name in _adaptable(model) if own_name(name) != head_leaf and name.startswith(within)]
    taken = {leaf for leaf in set(map(own_name, linears)) if becomes_experts(model, leaf)}
    linears = [name for name in linears if own_name(name) not in taken]
    by_leaf = Counter(map(own_name, linears))
    if asked in TARGET_PRESETS:
        modules = _preset(str(asked), model, linears)
        wanted = tuple(sorted(set(map(own_name, modules))))
        if not modules:
            inside = sorted(set(map(own_name, _preset("attention", model, linears))))
            has = f" (its attention has {', '.join(inside)})" if inside else ""
            raise UsageError(
                f"lora.target_modules: the preset {asked!r} finds nothing in this architecture{has}. Name modules "
                f"instead; these match: {_listing(by_leaf)}"
            )
    else:
        wanted = (asked,) if isinstance(asked, str) else tuple(sorted(set(asked)))
        for name in wanted:
            _refuse_experts(model, name, by_leaf)
            _check_name(name, head_leaf, linears, by_leaf)
        modules = [name for name in linears if matches(name, wanted)]
    names = [each for name in wanted for each in _precise(name, model, modules)]
    return Targets(tuple(names), tuple(modules), within, _left_out(asked, taken))


def _refuse_experts(model: PreTrainedModel, name: str, by_leaf: Counter[str]) -> None:
    if becomes_experts(model, name):
        raise UsageError(
            f"lora.target_modules: PEFT {peft.__version__} takes {name!r} of a {model.config.model_type} for its "
            "experts and would adapt all of them, as parameters, and no Linear of that name; whoever loads the adapter "
            f"would have it read so too. Remove it; these would match: {_listing(by_leaf)}"
        )


def _left_out(asked: str | Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    if asked not in TARGET_PRESETS or not taken:
        return ()
    return (
        f"lora.target_modules: {asked} leaves out {', '.join(sorted(taken))}, names that PEFT {peft.__version__} takes "
        "for the experts of this family",
    )


def _adaptable(model: PreTrainedModel) -> Iterator[str]:
    """Names of the modules that PEFT adapts as a Linear."""
    lora = peft.LoraConfig()
    past = READ_PAST.get(model.config.get_text_config().model_type, ())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and _is_plain(module) and own_name(name) not in past:
            try:
                refuse_for_mamba(lora, model, own_name(name))
            except ValueError:
                continue
            yield name


def _is_plain(module: Any) -> bool:
    """Whether it gives a tensor for a row: of its subclasses, a router of Llama 4 gives several, DeepSeek-V4's grouped
    Linear takes groups, and Falcon's is plain.
    """
    if type(module).forward in (torch.nn.Linear.forward, Conv1D.forward):
        return True
    row = torch.empty(1, module.weight.shape[1], dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            return isinstance(module(row), torch.Tensor)
    except Exception:  # it takes something else than a row
        return False


def _check_name(name: str, head_leaf: str | None, linears: Iterable[str], by_leaf: Counter[str]) -> None:
    if name == head_leaf:
        raise UsageError(
            f"lora.target_modules: {name!r} is the LM head. The fused loss multiplies by its weight directly, so "
            f"an adapter there would never train. Remove it; these would match: {_listing(by_leaf)}"
        )
    if not any(matches(module, (name,)) for module in linears):
        close = difflib.get_close_matches(name, by_leaf, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"lora.target_modules: {name!r} matches no Linear module of this model that PEFT adapts."
            f"{hint} These match: {_listing(by_leaf)}; or a preset: {', '.join(TARGET_PRESETS)}"
        )


def _preset(asked: str, model: PreTrainedModel, linears: Iterable[str]) -> list[str]:
    if asked == "all-linear":
        return list(linears)
    inside = [name for name in linears if _is_attention(model, name.rpartition(".")[0])]
    return [name for name in inside if asked == "attention" or own_name(name) in _QUERY_AND_VALUE]


def _is_attention(model: PreTrainedModel, name: str) -> bool:
    return own_name(name) in _ATTENTION_BLOCKS or type(model.get_submodule(name)).__name__.endswith("Attention")


def attends(model: PreTrainedModel) -> bool:
    """Whether it has attention at all."""
    return any(_is_attention(model, name) for name, _ in model.named_modules())


def _precise(name: str, model: PreTrainedModel, chosen: Iterable[str]) -> list[str]:
    """`name` where PEFT would match it with chosen modules alone; else the full names of those."""
    matched = {each for each, _ in model.named_modules() if matches(each, (name,))}
    return [name] if matched <= set(chosen) else sorted(matched & set(chosen))


def matches(module: str, wanted: Iterable[str]) -> bool:
    """As PEFT matches a list: the full name or a suffix of whole parts."""
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def own_name(name: str) -> str:
    """The last part of a module's full name."""
    return name.rpartition(".")[2]


def _listing(by_leaf: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(by_leaf.items()))


# Model types whose attention keeps packed samples apart, with sdpa and with eager: transformers builds their masks from
# the samples' positions. tests/models/test_packing.py runs each of them, packed and one by one.
KEEPS_APART = (
    "gemma", "gemma3_text", "granite", "granitemoe", "llama", "mistral", "mixtral", "olmo2",
    "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
_ATTENTION = ("full_attention", "sliding_attention", "attention")


def why_not_packed(config: Any) -> str | None:
    """Why a model of this configuration cannot train on packed samples; None if it can.

    A recurrent layer's state runs on from one sample into the next unless a kernel is told where samples end
    (`seq_idx`). transformers 5.23 refuses that in the first step without the packages causal_conv1d and mamba_ssm
    (integrations/hub_kernels.py), and with mamba_ssm a model in 4 bits fails: the kernel takes `out_proj.weight` as it
    is stored. The attention masks of granitemoehybrid are built without the samples' positions
    (`GraniteMoeHybridModel.forward`), so without a word each sample would attend to those before it.
    """
    text = config.get_text_config()
    content = text.to_dict()
    layers = content.get("layer_types") or content.get("layers_block_type") or []
    recurrent = sum(layer not in _ATTENTION for layer in layers)
    if recurrent:
        return (
            f"{recurrent} of its {len(layers)} layers are recurrent ({text.model_type}), and their state would run on "
            "from each packed sample into the next"
        )
    if text.model_type == "granitemoehybrid":
        return "transformers builds the attention masks of granitemoehybrid without looking where packed samples end"
    if config.model_type != text.model_type or text.model_type not in KEEPS_APART:
        return (
            f"whether {config.model_type} keeps packed samples apart is not tested; these do: {', '.join(KEEPS_APART)}"
        )
    return None


EMBEDDING_BITS: dict[str, Literal[8, 4] | None] = {"none": None, "8bit": 8, "4bit": 4}
_WAY_OUT = {"scan": "auto", "quantised_embeddings": "none", "lean": "false"}


def lean_options(recipe: Recipe) -> LeanOptions:
    """The section `lean` as options."""
    return LeanOptions(
        tile_length=recipe.lean.tile_length,
        scan_chunk_length=recipe.lean.scan_chunk_length,
        scan=recipe.lean.scan,
        checkpointing=recipe.lean.checkpoints,
        loss_tile_bytes=recipe.lean.loss_tile_bytes,
        dequantised_tile_bytes=recipe.lean.dequantised_tile_bytes,
        quantised_embeddings=EMBEDDING_BITS[recipe.lean.quantised_embeddings],
    )


def targets_of(model: PreTrainedModel, lora: Lora) -> Targets:
    """The modules that get an adapter: those that the recipe targets, less its exclusions.

    A regular expression matches whole paths of modules, as PEFT's does; an excluded name takes all inside it along.

    Raises:
        UsageError: as `resolve_targets`; what matches no module; exclusions that leave none.
    """
    asked, excluded = lora.target_modules, lora.exclude_modules
    named = isinstance(asked, tuple) or asked in TARGET_PRESETS
    found = resolve_targets(model, asked if named else "all-linear")
    if named and excluded is None:
        return found
    linears = resolve_targets(model, "all-linear").modules if named else found.modules
    modules, notes = found.modules, found.notes
    if not named:
        modules, notes = tuple(_matched("target_modules", str(asked), str(asked), linears)), ()
    if excluded is not None:
        names = excluded if isinstance(excluded, tuple) else ()
        patterns = {name: rf"(.*\.)?{re.escape(name)}(\..*)?" for name in names} or {str(excluded): str(excluded)}
        out = {each for name, its in patterns.items() for each in _matched("exclude_modules", name, its, linears)}
        modules = tuple(name for name in modules if name not in out)
    if not modules:
        raise UsageError(
            f"lora.exclude_modules: {excluded!r} excludes every module that target_modules "
            f"{asked!r} adapts, and nothing would train. Exclude fewer"
        )
    return Targets(modules, modules, found.within, notes)


def _matched(leaf: str, shown: str, pattern: str, linears: Sequence[str]) -> list[str]:
    """The modules whose whole path `pattern` matches; raises `UsageError` where there is none."""
    matched = [name for name in linears if re.fullmatch(pattern, name)]
    if not matched:
        shapes = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".0", name) for name in linears)
        raise UsageError(
            f"lora.{leaf}: {shown!r} matches no module that can be adapted; their paths look like {', '.join(shapes)}"
        )
    return matched


@contextmanager
def lean_refusals(recipe: Recipe) -> Iterator[None]:
    """Around what applies an idea.

    Raises:
        UsageError: the model or its device refuses an option; names the recipe's field.
    """
    try:
        yield
    except RefusedOptionError as error:
        spec = field_specs()[error.option]
        value = getattr(recipe.lean, error.option)
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise UsageError(
            f"{spec.path}: {shown}, and {recipe.base.model!r} cannot: {error.reason}. Allowed here is "
            f"{allowed(spec)}; set {spec.path} to {_WAY_OUT[error.option]} ({spec.flag} {_WAY_OUT[error.option]})"
        ) from error


def what_is_left_out(report: LeanReport) -> list[str]:
    """A line for each reason why ideas were not applied: a model that takes few of them should not seem to take all."""
    by_reason: dict[str, list[str]] = {}
    for idea in report.not_applied:
        by_reason.setdefault(idea.detail, []).append(idea.name)
    return [f"lean leaves out {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
