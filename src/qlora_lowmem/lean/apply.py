"""`apply_lean`: switch the ideas of this package on in a model, and say which."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qlora_lowmem.lean import generic, granite, llama
from qlora_lowmem.lean.decoder import Family, patch
from qlora_lowmem.lean.embeddings import QuantisedEmbedding, QuantisedHead, QuantisedTable
from qlora_lowmem.lean.families import TILED_FAMILIES, why_not_tiles
from qlora_lowmem.lean.linear4bit import patch_linear_4bit
from qlora_lowmem.lean.options import Idea, LeanOptions, LeanReport, RefusedOptionError
from qlora_lowmem.lean.scan_choice import choose_scan, refused_triton, why_never_triton
from qlora_lowmem.lean.scoring import head_of

_OF_TILES = ("tiles", "scan", "attention", "swiglu")  # what needs a model's layers in tiles
_BUILT_LIKE = {"granite": granite.FAMILY, "llama": llama.FAMILY}
_FAMILIES = {each.causal_class: each for each in TILED_FAMILIES.values()}


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
    name = type(causal).__name__
    ideas: list[Idea] = []
    if options.quantised_embeddings is not None:
        ideas.append(quantise_embeddings(causal, options.quantised_embeddings))
    family, refusal = _family_of(causal)
    if family is not None:
        mixers = _mamba_mixers(causal)
        kind, scan = choose_scan(options.scan, mixers[0]) if mixers else ("plain", "")
        patch(causal, family, replace(options, scan=kind))
        # For the calls that take the model's own forward.
        generic.enable_checkpointing(causal, options)
        ideas = [*_ideas_of_tiles(causal, family, options, scan), *ideas]
    else:
        ideas += (Idea(each, False, refusal) for each in _OF_TILES)
        ideas.append(generic.patch_rms_norms(causal))
        ideas.append(generic.enable_checkpointing(causal, options))
        ideas.append(generic.patch_loss(causal, options))
    dequantisation = patch_linear_4bit(causal, options.dequantised_tile_bytes)
    if dequantisation is not None:
        ideas.append(dequantisation)
    return LeanReport(name, tuple(ideas))


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
        _check_quantisable(causal, options.quantised_embeddings)
    family, refusal = _family_of(causal)
    if family is None:
        general = (
            generic.foresee_rms_norms(causal),
            generic.foresee_checkpointing(causal, options),
            generic.foresee_loss(causal, options),
        )
        return LeanReport(type(causal).__name__, (*(Idea(each, False, refusal) for each in _OF_TILES), *general))
    mixers = _mamba_mixers(causal)
    never = why_never_triton(mixers[0], device) if mixers and options.scan == "triton" else None
    if never is not None:
        raise refused_triton(never)
    return LeanReport(type(causal).__name__, tuple(_ideas_of_tiles(causal, family, options, "chosen on the device")))


def _causal_language_model(model: nn.Module) -> Any:
    for module in model.modules():
        # PEFT's wrapper is a PeftModelForCausalLM; the model inside is what is meant.
        if type(module).__name__.endswith("ForCausalLM") and not type(module).__name__.startswith("Peft"):
            return module
    reason = f"{type(model).__name__} contains no ...ForCausalLM, and lean works on causal language models"
    raise RefusedOptionError("lean", True, reason, "leave the model as it is")


def _family_of(causal: Any) -> tuple[Family | None, str]:
    """The family that serves a model; or None, and why no family does."""
    name = type(causal).__name__
    known = _FAMILIES.get(name)
    if known is None:
        return None, f"layers in tiles are known for {', '.join(_FAMILIES)}, not for {name}"
    refusal = why_not_tiles(known, causal.config.to_dict())
    return (_BUILT_LIKE[known.built_like], "") if refusal is None else (None, refusal)


def _mamba_mixers(causal: Any) -> list[Any]:
    mixers = (getattr(layer, "mamba", None) for layer in causal.model.layers)
    return [mixer for mixer in mixers if mixer is not None]


def _ideas_of_tiles(causal: Any, family: Family, options: LeanOptions, scan: str) -> list[Idea]:
    """What to say of a model in tiles; an idea that it has no layer for is not spoken of unless it was asked for."""
    layers, scans, head = len(causal.model.layers), len(_mamba_mixers(causal)), head_of(causal.lm_head)
    length = options.tile_length or "by the sequence 512 to 2,048"
    plain = "packed samples, caches and masks of one's own take the model's own forward"
    window = family.window(causal.config)
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


def quantise_embeddings(causal: Any, bits: int, device: torch.device | None = None) -> Idea:
    """Replace the tied embedding and LM head by one table in `bits` bits; a model that has it already is left alone.

    Done while a model loads, it saves the 16-bit table: move the weight to host memory and name the `device`.

    Raises:
        RefusedOptionError: embeddings that are trained, untied or adapted; 4 bits of an odd width.
    """
    embedding = causal.get_input_embeddings()
    if isinstance(embedding, QuantisedEmbedding) and embedding.table.bits == bits:
        return _quantised(embedding.table)
    _check_quantisable(causal, bits)
    if embedding.weight.requires_grad:
        reason = "the embedding is trained"
        raise RefusedOptionError("quantised_embeddings", bits, reason, "freeze it (PEFT does) or use None")
    table = QuantisedTable(embedding.weight, bits, device)
    causal.set_input_embeddings(QuantisedEmbedding(table))
    causal.set_output_embeddings(QuantisedHead(table))
    return _quantised(table)


def _check_quantisable(causal: Any, bits: int) -> None:
    """Refuse what `quantise_embeddings` cannot replace; whether it is trained is not asked."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        reason, advice = f"the embeddings are {kinds}, already quantised or adapted", "leave them as they are"
    elif embedding.weight is not head.weight:
        reason, advice = "the model's embedding and LM head are not tied", "use None"
    elif bits == 4 and embedding.weight.shape[1] % 2:
        reason, advice = f"4 bits need an even hidden size, and this is {embedding.weight.shape[1]}", "use 8"
    else:
        return
    raise RefusedOptionError("quantised_embeddings", bits, reason, advice)


def _quantised(table: QuantisedTable) -> Idea:
    detail = f"{table.words} x {table.width} in {table.bits} bits, shared with the LM head"
    return Idea("quantised_embeddings", True, detail)
