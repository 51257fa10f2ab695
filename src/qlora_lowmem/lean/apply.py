"""`apply_lean`: switch the ideas of this package on in a model, and say which.

A family of `families.py` gets every idea. Other causal language models get those that are general: norms, 4-bit layers,
one checkpoint a layer, and the loss by tiles, which needs a backbone, a plain LM head and logits that are at most
scaled.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from qlora_lowmem.lean.adapters import patch_adapters
from qlora_lowmem.lean.decoder import head_of, patch
from qlora_lowmem.lean.embeddings import check_quantisable, quantise_embeddings
from qlora_lowmem.lean.families import TILED_FAMILIES, Family, why_not_tiles
from qlora_lowmem.lean.layers import window_of
from qlora_lowmem.lean.linear4bit import patch_linear_4bit
from qlora_lowmem.lean.norms import rms_norms_of
from qlora_lowmem.lean.options import Idea, LeanOptions, LeanReport, RefusedOptionError
from qlora_lowmem.lean.scan_triton import choose_scan, refused_triton, why_never_triton
from qlora_lowmem.lean.token_rows import patch_token_rows

_OF_TILES = ("tiles", "scan", "attention", "swiglu")  # what needs a model's layers in tiles
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # the second are GPT-2 and others of its time
_FAMILIES = {each.causal_class: each for each in TILED_FAMILIES.values()}

__all__ = ["apply_lean", "foresee_lean", "quantise_embeddings"]


def apply_lean(model: nn.Module, options: LeanOptions | None = None) -> LeanReport:
    """Patch a causal language model so that its training steps need less memory, with the same loss and gradients.

    Works on the instances of modules, in place and for good; checkpoints, adapters and `state_dict` stay as they are
    (except with quantised embeddings, whose table is no longer a parameter). Call it when adapters are in place: what
    is trained and what is frozen is read at every forward. A trainer that patches `model.forward` itself (TRL's
    `SFTTrainer` adds its fused LM head) must have done so before.

    Args:
        model: a transformers model `...ForCausalLM`, alone or inside PEFT's wrapper, its linear layers in 4 bits or
            not. Granite hybrids, Granite, Llama, Mistral, Qwen 2 and 3 and SmolLM 3 get every idea; other models get
            those that are general.
        options: what to switch on; None for the defaults.

    Returns:
        Which ideas the model took, and which not, with the cause.

    Raises:
        RefusedOptionError (a ValueError): there is no causal language model inside, or quantised embeddings are asked
            for where they are trained, untied or adapted, or `scan="triton"` where it does not work.
    """
    options = options or LeanOptions()
    causal = _causal_language_model(model)
    ideas: list[Idea] = []
    if options.quantised_embeddings is not None:
        ideas.append(quantise_embeddings(causal, options.quantised_embeddings))
    rows = patch_token_rows(causal)
    if rows is not None:
        ideas.append(rows)
    family, refusal = _family_of(causal)
    if family is not None:
        mixers = _mamba_mixers(causal)
        kind, scan = choose_scan(options.scan, mixers[0]) if mixers else ("plain", "")
        patch(causal, family, replace(options, scan=kind))
        ideas = [*_ideas_of_tiles(causal, options, scan), *ideas]
        general = [_checkpointing(causal, options)]  # for the calls that take the model's own forward
    else:
        general = _general_ideas(causal, options)
        ideas += [*(Idea(each, False, refusal) for each in _OF_TILES), *(idea for idea, _ in general)]
    for idea, switch_on in general:
        if idea.applied:
            switch_on()
    linear = (patch_linear_4bit, patch_adapters)  # in this order: adapters ask a layer that the first has patched
    found = (switch_on(causal, options.dequantised_tile_bytes) for switch_on in linear)
    ideas += [idea for idea in found if idea is not None]
    return LeanReport(type(causal).__name__, tuple(ideas))


def foresee_lean(model: nn.Module, options: LeanOptions | None = None, device: str = "cuda") -> LeanReport:
    """What `apply_lean` will say of a model, from its modules and its configuration alone: nothing runs or is changed.

    For a model on the meta device, before any weights are read. Which scan runs is chosen on the device itself, and of
    4-bit layers nothing is said: they are made as the weights are read.

    Args:
        device: the type of the device on which the model will train.

    Raises:
        RefusedOptionError: as `apply_lean`, where it can be known.
    """
    options = options or LeanOptions()
    causal = _causal_language_model(model)
    if options.quantised_embeddings is not None:
        check_quantisable(causal, options.quantised_embeddings)
    family, refusal = _family_of(causal)
    if family is None:
        general = (idea for idea, _ in _general_ideas(causal, options))
        return LeanReport(type(causal).__name__, (*(Idea(each, False, refusal) for each in _OF_TILES), *general))
    mixers = _mamba_mixers(causal)
    never = why_never_triton(mixers[0], device) if mixers and options.scan == "triton" else None
    if never is not None:
        raise refused_triton(never)
    return LeanReport(type(causal).__name__, tuple(_ideas_of_tiles(causal, options, "chosen on the device")))


def _causal_language_model(model: nn.Module) -> Any:
    for module in model.modules():
        # PEFT's wrapper is a PeftModelForCausalLM; the model inside is what is meant.
        name = type(module).__name__
        if name.endswith(_CAUSAL) and not name.startswith("Peft"):
            return module
        if name.endswith("ForConditionalGeneration") and _text_config(module) is not module.config:
            return module  # a language model with encoders before it
    reason = f"{type(model).__name__} contains no ...ForCausalLM, and lean works on causal language models"
    raise RefusedOptionError("lean", True, reason, "leave the model as it is")


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _family_of(causal: Any) -> tuple[Family | None, str]:
    """The family that serves a model; or None, and why no family does."""
    name = type(causal).__name__
    known = _FAMILIES.get(name)
    if known is None:
        return None, f"layers in tiles are known for {', '.join(_FAMILIES)}, not for {name}"
    refusal = why_not_tiles(known, causal.config.to_dict())
    return (known, "") if refusal is None else (None, refusal)


def _mamba_mixers(causal: Any) -> list[Any]:
    mixers = (getattr(layer, "mamba", None) for layer in causal.model.layers)
    return [mixer for mixer in mixers if mixer is not None]


def _ideas_of_tiles(causal: Any, options: LeanOptions, scan: str) -> list[Idea]:
    """What to say of a model in tiles; an idea that it has no layer for is not spoken of unless it was asked for."""
    layers, scans, head = len(causal.model.layers), len(_mamba_mixers(causal)), head_of(causal.lm_head)
    length = options.tile_length or "by the sequence 512 to 2,048"
    plain = "packed samples, caches and masks of one's own take the model's own forward"
    window = window_of(causal.config)
    if window is not None:
        plain += f", and so does what is longer than its window of {window:,}"
    loss = (
        f"logits in tiles of at most {options.loss_tile_bytes} bytes"
        if head is not None
        else f"the LM head is a {type(causal.lm_head).__name__}: adapted or biased heads build whole logits"
    )
    ideas = [Idea("tiles", True, f"{layers} layers, {length} tokens a tile; {plain}")]
    if scans:
        ideas.append(Idea("scan", True, f"{scans} Mamba-2 layers, {scan}"))
    elif options.scan == "triton":
        ideas.append(Idea("scan", False, "the model has no Mamba-2 layer"))
    if scans < layers:
        ideas.append(Idea("attention", True, f"{layers - scans} layers by tiles of queries"))
    return [
        *ideas,
        Idea("rms_norm", True, "all norms of the decoder"),
        Idea("swiglu", True, "all feed-forward parts"),
        Idea("checkpointing", True, options.checkpointing),
        Idea("loss", head is not None, loss),
    ]


def _general_ideas(causal: Any, options: LeanOptions) -> list[tuple[Idea, Callable[[], None]]]:
    """What to say of a model of any family, each idea with what switches it on where it applies."""
    return [rms_norms_of(causal), _checkpointing(causal, options), _loss(causal, options)]


def _checkpointing(model: Any, options: LeanOptions) -> tuple[Idea, Callable[[], None]]:
    """One checkpoint a layer, as the model itself offers it."""

    def switch_on() -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings' output want a gradient, which reentrant checkpoints need. These do not, and
        # it costs a residual tensor with its gradient.
        model.disable_input_require_grads()

    offered = bool(getattr(model, "supports_gradient_checkpointing", False))
    if not offered:
        detail = f"{type(model).__name__} does not support gradient checkpointing"
    elif options.checkpointing == "layer":
        detail = "one a layer, by the model's own gradient_checkpointing_enable"
    else:
        detail = f"one a layer: {options.checkpointing!r} needs layers in tiles, which this model does not have"
    return Idea("checkpointing", offered, detail), switch_on


def _loss(causal: Any, options: LeanOptions) -> tuple[Idea, Callable[[], None]]:
    """The loss by tiles, wherever labels are given and the model only scales its logits."""
    refusal = _why_not_loss(causal)
    detail = refusal or f"logits in tiles of at most {options.loss_tile_bytes} bytes"
    return Idea("loss", refusal is None, detail), functools.partial(patch, causal, None, options)


def _why_not_loss(causal: Any) -> str | None:
    config, head = _text_config(causal), causal.get_output_embeddings()
    backbone = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    if head_of(head) is None:
        return f"the LM head is a {type(head).__name__}, not a plain Linear without bias"
    if backbone is None or backbone is causal:
        return f"{type(causal).__name__} has no backbone of its own to take hidden states from"
    transforms = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "output_multiplier")
    unknown = [name for name in transforms if getattr(config, name, None) is not None]
    if unknown:
        return f"the config transforms logits in a way that is not known here: {', '.join(unknown)}"
    if getattr(config, "logits_scaling", None) is not None and "granite" not in config.model_type:
        return f"logits_scaling of model type {config.model_type!r} may multiply or divide"
    return None
