"""The ideas that are general, for causal language models that have no adapter of their own.

The loss by tiles needs a backbone, a plain LM head and logits that are at most scaled. The RMSNorm needs a module that
computes what ours computes: tried on random rows, because families differ (Gemma multiplies by 1 + weight) and names
do not say how.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.lean.loss import HeadOptions
from qlora_lowmem.lean.norms import rms_norm
from qlora_lowmem.lean.options import Idea, LeanOptions
from qlora_lowmem.lean.scoring import head_of, score


def patch_rms_norms(model: nn.Module) -> Idea:
    """Give every RMSNorm that computes what ours does our forward."""
    known, idea = _rms_norms(model)
    for module, eps in known:
        module.forward = types.MethodType(functools.partial(_norm_forward, eps=eps), module)
    return idea


def foresee_rms_norms(model: nn.Module) -> Idea:
    """What `patch_rms_norms` will say; nothing is changed."""
    return _rms_norms(model)[1]


def _rms_norms(model: nn.Module) -> tuple[list[tuple[Any, float]], Idea]:
    """The norms that compute what ours does, each with its epsilon, and what to say of them."""
    known: list[tuple[Any, float]] = []
    other: set[str] = set()
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float) and _computes_rms_norm(module, eps):
            known.append((module, eps))
        else:
            other.add(type(module).__name__)
    if not known:
        reason = f"no RMSNorm that is known ({', '.join(sorted(other)) or 'none in the model'})"
        return known, Idea("rms_norm", False, reason)
    rest = f"; not known: {', '.join(sorted(other))}" if other else ""
    return known, Idea("rms_norm", True, f"{len(known)} norms{rest}")


def _norm_forward(self: Any, hidden_states: Tensor, *, eps: float) -> Tensor:
    return rms_norm(hidden_states, self.weight, eps)


@torch.no_grad()
def _computes_rms_norm(module: Any, eps: float) -> bool:
    """Tried in host memory, with weights of its own: a virtual GPU and a module on the meta device have no values."""
    generator = torch.Generator().manual_seed(0)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Weights of one cannot tell w from another function of w that is one there.
    tried = {name: (torch.rand(t.shape, generator=generator) + 0.5).to(t.dtype) for name, t in state.items()}
    weight = tried["weight"]
    rows = torch.randn(4, weight.shape[-1], generator=generator).to(weight.dtype)
    found = torch.func.functional_call(module, tried, (rows,))
    return torch.allclose(found.float(), rms_norm(rows, weight, eps).float(), rtol=2e-2, atol=1e-3)


def patch_loss(causal: Any, options: LeanOptions) -> Idea:
    """Compute the loss by tiles wherever labels are given and the model only scales its logits."""
    idea = foresee_loss(causal, options)
    if not idea.applied:
        return idea
    scaling = getattr(causal.config, "logits_scaling", None)
    head_options = HeadOptions(1.0 if scaling is None else 1 / scaling, options.loss_tile_bytes)
    plain = causal.forward
    forward = functools.partial(_loss_forward, plain=plain, options=head_options)
    causal.forward = types.MethodType(functools.wraps(type(causal).forward)(forward), causal)
    return idea


def foresee_loss(causal: Any, options: LeanOptions) -> Idea:
    """What `patch_loss` will say; nothing is changed."""
    name, config, head = "loss", causal.config, causal.get_output_embeddings()
    backbone = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    if head_of(head) is None:
        return Idea(name, False, f"the LM head is a {type(head).__name__}, not a plain Linear without bias")
    if backbone is None or backbone is causal:
        return Idea(name, False, f"{type(causal).__name__} has no backbone of its own to take hidden states from")
    unknown = [k for k in ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "output_multiplier")
               if getattr(config, k, None) is not None]  # fmt: skip
    if unknown:
        return Idea(name, False, f"the config transforms logits in a way that is not known here: {', '.join(unknown)}")
    if getattr(config, "logits_scaling", None) is not None and "granite" not in config.model_type:
        return Idea(name, False, f"logits_scaling of model type {config.model_type!r} may multiply or divide")
    return Idea(name, True, f"logits in tiles of at most {options.loss_tile_bytes} bytes")


def _loss_forward(
    self: Any,
    *args: Any,
    plain: Callable[..., Any],
    options: HeadOptions,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    fused_lm_head: bool = False,
    **kwargs: Any,
) -> Any:
    head = head_of(self.get_output_embeddings())
    unlabelled = labels is None and shift_labels is None
    if unlabelled or head is None or kwargs.get("output_router_logits") or kwargs.get("past_key_values") is not None:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return plain(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
    output = getattr(self, self.base_model_prefix)(*args, **kwargs | {"use_cache": False, "return_dict": True})
    options = replace(options, entropy=fused_lm_head)
    hidden = output.last_hidden_state
    scored = score(hidden, labels, shift_labels, num_items_in_batch, head, lambda rows: rows * 1, options)
    if fused_lm_head:
        return scored.fused_output()
    output["loss"] = scored.loss
    return output


def enable_checkpointing(model: Any, options: LeanOptions) -> Idea:
    """One checkpoint a layer, as the model itself offers it."""
    idea = foresee_checkpointing(model, options)
    if idea.applied:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings' output want a gradient, which reentrant checkpoints need. These do not, and
        # it costs a residual tensor with its gradient.
        model.disable_input_require_grads()
    return idea


def foresee_checkpointing(model: Any, options: LeanOptions) -> Idea:
    """What `enable_checkpointing` will say; nothing is changed."""
    name = "checkpointing"
    if not getattr(model, "supports_gradient_checkpointing", False):
        return Idea(name, False, f"{type(model).__name__} does not support gradient checkpointing")
    if options.checkpointing == "layer":
        return Idea(name, True, "one a layer, by the model's own gradient_checkpointing_enable")
    return Idea(
        name, True, f"one a layer: {options.checkpointing!r} needs layers in tiles, which this model does not have"
    )
