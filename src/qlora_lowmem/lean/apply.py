"""`apply_lean`: switch the ideas of this package on in a model, and say which."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from . import generic, granite
from .embeddings import QuantisedEmbedding, QuantisedHead, QuantisedTable
from .options import Idea, LeanOptions, LeanReport
from .scan_choice import choose_scan
from .scoring import head_of


def apply_lean(model: nn.Module, options: LeanOptions | None = None) -> LeanReport:
    """Patch a causal language model so that its training steps need less memory, with the same loss and gradients.

    Works on the instances of modules, in place and for good; checkpoints, adapters and `state_dict` stay as they are
    (except with quantised embeddings, whose table is no longer a parameter). Call it when adapters are in place: what
    is trained and what is frozen is read at every forward. A trainer that patches `model.forward` itself (TRL's
    `SFTTrainer` adds its fused LM head) must have done so before.

    Args:
        model: a transformers model `...ForCausalLM`, alone or inside PEFT's wrapper, its linear layers in 4 bits or
            not. Granite hybrids get every idea; other models get those that are general.
        options: what to switch on; None for the defaults.

    Returns:
        Which ideas the model took, and which not, with the cause.

    Raises:
        ValueError: there is no causal language model inside, or quantised embeddings are asked for where they are
            trained, untied or adapted, or `scan="triton"` where it does not work.
    """
    options = options or LeanOptions()
    causal = _causal_language_model(model)
    name = type(causal).__name__
    ideas: list[Idea] = []
    if options.quantised_embeddings is not None:
        ideas.append(quantise_embeddings(causal, options.quantised_embeddings))
    refusal = _why_not_tiles(causal)
    if refusal is None:
        mixers = [layer.mamba for layer in causal.model.layers if layer.mamba is not None]
        kind, scan = choose_scan(options.scan, mixers[0]) if mixers else ("plain", "")
        granite.patch(causal, replace(options, scan=kind))
        ideas = [*_granite_ideas(causal, options, scan), *ideas]
    else:
        ideas.append(Idea("tiles", False, refusal))
        ideas.append(Idea("scan", False, refusal))
        ideas.append(Idea("attention", False, refusal))
        ideas.append(Idea("swiglu", False, refusal))
        ideas.append(generic.patch_rms_norms(causal))
        ideas.append(generic.enable_checkpointing(causal, options))
        ideas.append(generic.patch_loss(causal, options))
    return LeanReport(name, tuple(ideas))


def _causal_language_model(model: nn.Module) -> Any:
    for module in model.modules():
        # PEFT's wrapper is a PeftModelForCausalLM; the model inside is what is meant.
        if type(module).__name__.endswith("ForCausalLM") and not type(module).__name__.startswith("Peft"):
            return module
    raise ValueError(f"{type(model).__name__} contains no ...ForCausalLM; lean works on causal language models")


def _why_not_tiles(causal: Any) -> str | None:
    if type(causal).__name__ != granite.MODEL_CLASS:
        return f"layers in tiles are known for {granite.MODEL_CLASS}, not for {type(causal).__name__}"
    if causal.config.hidden_act != "silu":
        return f"hidden_act={causal.config.hidden_act!r}: the convolution in tiles applies SiLU"
    dropout = causal.config.attention_dropout
    if dropout:
        return f"attention_dropout={dropout}: attention by blocks of keys has no dropout; set it to 0"
    return None


def _granite_ideas(causal: Any, options: LeanOptions, scan: str) -> list[Idea]:
    layers = causal.model.layers
    scans = sum(layer.mamba is not None for layer in layers)
    head = head_of(causal.lm_head)
    return [
        Idea(
            "tiles",
            True,
            f"{len(layers)} layers, {options.tile_length or 'by the sequence 512 to 2,048'} tokens a tile; packed samples, "
            "caches and masks of one's own take the model's own forward",
        ),
        Idea("scan", scans > 0, f"{scans} Mamba-2 layers, {scan}" if scans else "the model has no Mamba-2 layer"),
        Idea("attention", scans < len(layers), f"{len(layers) - scans} layers by tiles of queries"),
        Idea("rms_norm", True, "all norms of the decoder"),
        Idea("swiglu", True, "all shared MLPs"),
        Idea("checkpointing", True, options.checkpointing),
        Idea(
            "loss",
            head is not None,
            f"logits in tiles of at most {options.loss_tile_bytes} bytes"
            if head is not None
            else f"the LM head is a {type(causal.lm_head).__name__}: adapted or biased heads build whole logits",
        ),
    ]


def quantise_embeddings(causal: Any, bits: int, device: torch.device | None = None) -> Idea:
    """Replace the tied embedding and LM head by one table in `bits` bits; a model that has it already is left alone.

    Done while a model loads, it saves the 16-bit table: move the weight to host memory and name the `device`.

    Raises:
        ValueError: embeddings that are trained, untied or adapted.
    """
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if isinstance(embedding, QuantisedEmbedding) and embedding.table.bits == bits:
        return _quantised(embedding.table)
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(
            f"quantised_embeddings={bits}: the embeddings are {type(embedding).__name__} and {type(head).__name__}, "
            "already quantised or adapted; leave them out of target_modules and modules_to_save"
        )
    if embedding.weight is not head.weight:
        raise ValueError(f"quantised_embeddings={bits}: the model's embedding and LM head are not tied")
    if embedding.weight.requires_grad:
        raise ValueError(f"quantised_embeddings={bits}: the embedding is trained; freeze it (PEFT does) or use None")
    table = QuantisedTable(embedding.weight, bits, device)
    causal.set_input_embeddings(QuantisedEmbedding(table))
    causal.set_output_embeddings(QuantisedHead(table))
    return _quantised(table)


def _quantised(table: QuantisedTable) -> Idea:
    detail = f"{table.words} x {table.width} in {table.bits} bits, shared with the LM head"
    return Idea("quantised_embeddings", True, detail)
