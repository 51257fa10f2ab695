"""A recipe's training steps on ghost tensors: the same classes and the same order as the job, written again.

Nothing here is the job's own code (`run/job.py`, transformers' and TRL's trainers): what a trainer does to memory
is stated, and compared with what it does.
"""

import gc
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb_functional
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_lowmem.models.random_weights import config_from
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.models.targets import resolve_targets
from qlora_lowmem.recipe import Recipe
from witness.autocast import autocast_of_ghosts
from witness.card_paths import card_paths, temporaries
from witness.ledger import Account, GhostLedger, Peak, as_ghost, rounded

# A micro-batch of the job: ids, labels and an attention mask, all int64.
TENSORS_A_BATCH = 3


# Gradients are summed in place, so the second micro-batch finds all there is.
MICRO_BATCHES = 2


@dataclass(frozen=True)
class WitnessAccount:
    """What the ledger saw, in bytes, without cuBLAS workspaces.

    Attributes:
        peak: of the last optimizer step, with `MICRO_BATCHES` micro-batches or fewer.
        further_batches: what the job's further micro-batches, which lie on the card together, take besides.
    """

    peak: Peak
    further_batches: int


def bear_witness(recipe: Recipe, capability: tuple[int, int], sm_count: int) -> WitnessAccount:
    """Run the recipe's steps in the ledger as on a card of that kind; bf16, as on sm_80 and later.

    Raises:
        ValueError: the recipe has something that is not written here.
    """
    _refuse_what_is_not_written(recipe)
    account = Account()
    model = _base(recipe)
    with card_paths(capability, sm_count), autocast_of_ghosts(), GhostLedger(account, temporaries):
        _make_ghosts_of(model)
        adapted = _adapt(model, recipe)
        account.hold_model(adapted)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=recipe.optimizer.weight_decay)
        forward = _forward_as_accelerate_prepares_it(adapted)
        for _ in range(2):
            gc.collect()
            account.begin_phase()
            _step(recipe, forward, trained, optimizer)
        peak = account.peak()
    further = max(0, recipe.batch.gradient_accumulation_steps - MICRO_BATCHES)
    sample = rounded(recipe.batch.batch_size * recipe.batch.max_seq_length * 8)
    return WitnessAccount(peak, further * TENSORS_A_BATCH * sample)


def _refuse_what_is_not_written(recipe: Recipe) -> None:
    written = {
        "quantization.load_in_4bit": (recipe.quantization.load_in_4bit, True),
        "memory.activation_offloading": (recipe.memory.activation_offloading, False),
        "optimizer.optimizer": (recipe.optimizer.optimizer, "adamw_torch"),
        "optimizer.optimizer_state_dtype": (recipe.optimizer.optimizer_state_dtype, "auto"),
        "optimizer.gradient_release": (recipe.optimizer.gradient_release, False),
        "batch.packing": (recipe.batch.packing, False),
        "lean.lean": (recipe.lean.lean, False),
        "base.attention": (recipe.base.attention, "auto"),
    }
    for name, (value, only) in written.items():
        if value != only:
            raise ValueError(f"{name} is {value!r}; the witness knows only {only!r}")


def _base(recipe: Recipe) -> nn.Module:
    """The model on the meta device, its Linear modules but the (tied) LM head in 4 bits."""
    source = source_of(recipe)
    assert source.architecture is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_from(source.architecture), dtype=torch.bfloat16)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _in_4_bits(linear, recipe))
    return model


def _make_ghosts_of(model: nn.Module) -> None:
    """Replace parameters and buffers by ghosts; a tied parameter stays tied."""
    ghosts: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, Params4bit):
                ghost = nn.Parameter(as_ghost(parameter.data), requires_grad=parameter.requires_grad)
                module._parameters[name] = ghosts.setdefault(id(parameter), ghost)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = as_ghost(buffer.to("meta").detach())


def _in_4_bits(linear: nn.Linear, recipe: Recipe) -> Linear4bit:
    weight = torch.empty(linear.out_features, linear.in_features, dtype=torch.bfloat16, device="meta")
    packed, state = bnb_functional.quantize_4bit(
        weight,
        quant_type=recipe.quantization.quant_type,
        compress_statistics=recipe.quantization.double_quant,
    )
    quantised = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type=recipe.quantization.quant_type,
        device="meta",
    )
    quantised.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    quantised.quant_state = state
    if linear.bias is not None:
        quantised.bias = linear.bias
    return quantised


def _adapt(model: nn.Module, recipe: Recipe) -> nn.Module:
    """PEFT's adapters; TRL's fused head and its dtype for adapters of a quantised model, bf16."""
    if recipe.memory.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = resolve_targets(model, recipe.lora.target_modules)
    adapted: nn.Module = get_peft_model(
        model,
        LoraConfig(
            r=recipe.lora.lora_r,
            lora_alpha=recipe.lora.lora_alpha,
            lora_dropout=recipe.lora.lora_dropout,
            target_modules=list(targets.names),
            task_type="CAUSAL_LM",
        ),
    )
    if recipe.memory.gradient_checkpointing:
        adapted.enable_input_require_grads()
    add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    dtype = torch.float32 if recipe.lora.adapter_dtype == "fp32" else torch.bfloat16
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted.train()


def _forward_as_accelerate_prepares_it(model: nn.Module) -> Any:
    """Autocast around the model's forward, and its outputs in fp32 (accelerate, `Accelerator.prepare_model`)."""

    def with_autocast(**inputs: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(**inputs)

    return convert_outputs_to_fp32(with_autocast)


def _step(recipe: Recipe, forward: Any, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    shape = (recipe.batch.batch_size, recipe.batch.max_seq_length)
    names = ("input_ids", "labels", "attention_mask")
    accumulated = [
        {name: torch.empty(shape, dtype=torch.long, device="meta") for name in names}
        for _ in range(min(MICRO_BATCHES, recipe.batch.gradient_accumulation_steps))
    ]
    scored = torch.empty((), dtype=torch.long, device="meta")
    for batch in accumulated:
        _loss(recipe, forward, batch, scored).backward()
    if recipe.optimizer.max_grad_norm:
        nn.utils.clip_grad_norm_(trained, recipe.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _loss(recipe: Recipe, forward: Any, batch: dict[str, torch.Tensor], scored: torch.Tensor) -> torch.Tensor:
    if recipe.memory.loss == "full":
        return forward(**batch, use_cache=False, num_items_in_batch=scored)["loss"]
    output = forward(**batch, use_cache=False, fused_lm_head=True)
    return (-output.log_probs).sum() / scored.clamp(min=1)
