"""Which modules get an adapter: names and presets, resolved against the modules that the architecture really has."""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_lowmem.errors import UsageError

PRESETS = ("attention", "attention-qv", "all-linear")

# How attention blocks are called in transformers' models; their Linear children are the attention projections.
_ATTENTION_BLOCKS = ("self_attn", "self_attention", "attention", "attn")
_QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin")


@dataclass(frozen=True)
class Targets:
    """The resolved target modules.

    Attributes:
        names: the modules' own names or suffixes (`q_proj`), as `peft.LoraConfig.target_modules` takes them.
        modules: full names of every module that gets an adapter.
        linear_modules: how many Linear modules the model has in all, without the LM head.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    linear_modules: int


def resolve_targets(model: PreTrainedModel, asked: str | Iterable[str]) -> Targets:
    """Resolve a preset or a list of names against `model` (on any device, `meta` included).

    `attention` is every Linear directly inside an attention block; `attention-qv` its query and value projections;
    `all-linear` every Linear but the LM head. Experts and routers that transformers keeps as plain parameters are none.

    Raises:
        UsageError: a name or preset that matches nothing (PEFT would ignore it silently), listing what would match;
            the LM head, which TRL's fused loss reads directly, past any adapter.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != ""
    }
    head = next((name for name, module in linears.items() if module is model.get_output_embeddings()), None)
    linears.pop(head or "", None)
    by_leaf = Counter(name.rpartition(".")[2] for name in linears)
    wanted = _preset(asked, linears) if isinstance(asked, str) else tuple(asked)
    for name in wanted:
        if head is not None and name == head.rpartition(".")[2]:
            raise UsageError(
                f"lora.target_modules: {name!r} is the LM head. The fused loss multiplies by its weight directly, so "
                f"an adapter there would never train. Remove it; these would match: {_listing(by_leaf)}"
            )
        if not any(_matches(module, (name,)) for module in linears):
            close = difflib.get_close_matches(name, by_leaf, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"lora.target_modules: {name!r} matches no Linear module of this model, and PEFT would ignore it "
                f"silently.{hint} These match: {_listing(by_leaf)}; or a preset: {', '.join(PRESETS)}"
            )
    modules = tuple(name for name in linears if _matches(name, wanted))
    return Targets(
        names=tuple(sorted(set(wanted))),
        modules=modules,
        linear_modules=len(linears),
    )


def _preset(asked: str, linears: Iterable[str]) -> tuple[str, ...]:
    if asked not in PRESETS:
        return (asked,)
    names = list(linears)
    if asked == "all-linear":
        return tuple(sorted({name.rpartition(".")[2] for name in names}))
    inside = {
        name.rpartition(".")[2] for name in names if name.rpartition(".")[0].rpartition(".")[2] in _ATTENTION_BLOCKS
    }
    chosen = inside if asked == "attention" else inside & set(_QUERY_AND_VALUE)
    if not chosen:
        leaves = Counter(name.rpartition(".")[2] for name in names)
        raise UsageError(
            f"lora.target_modules: the preset {asked!r} finds nothing in this architecture"
            + (f" (its attention has {', '.join(sorted(inside))})" if inside else "")
            + f". Name modules instead; these match: {_listing(leaves)}"
        )
    return tuple(sorted(chosen))


def _matches(module: str, wanted: Iterable[str]) -> bool:
    """As PEFT matches a list: the full name or a suffix of whole parts."""
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _listing(by_leaf: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(by_leaf.items()))
