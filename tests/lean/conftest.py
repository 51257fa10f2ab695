"""Small random hybrids, plain and lean, and how their losses and gradients are compared."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig

from qlora_lowmem.lean import LeanOptions, apply_lean

VOCABULARY = 97
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "input_linear", "output_linear"]


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """On tensors this small threads cost more than they give, and minutes where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hybrid(
    layers: str = "mma", *, seed: int = 0, dtype: torch.dtype = torch.float32, lora_dropout: float = 0.0, **changes: Any
) -> nn.Module:
    """A hybrid with LoRA on all linear layers; `layers` has an m for a Mamba layer and an a for an attention layer."""
    torch.manual_seed(seed)
    names = {"m": "mamba", "a": "attention"}
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": len(layers),
        "layer_types": [names[letter] for letter in layers],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "shared_intermediate_size": 40,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mamba_expand": 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "tie_word_embeddings": True,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.22,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 3.0,
    }
    model = AutoModelForCausalLM.from_config(GraniteMoeHybridConfig(**fields | changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The initial ones would hide a weight that is forgotten.
            if "norm" in name or name.endswith((".D", "dt_bias")):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    # Random adapters at full strength make a model that amplifies fp32 rounding a hundredfold: the plain one is then
    # 1e-5 from a computation in doubles itself.
    lora = LoraConfig(r=4, lora_alpha=1, target_modules=TARGETS, init_lora_weights=False, lora_dropout=lora_dropout)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def batch_of(batch: int, seq: int, padding: str | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens; with padding (`left` or `right`) the first row has a quarter of it, masked and not scored."""
    tokens = torch.randint(0, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    if padding is not None:
        mask[0, slice(0, seq // 4) if padding == "left" else slice(seq - seq // 4, seq)] = 0
        labels[mask == 0] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and every gradient of one training step."""
    model.zero_grad()
    # Asked for a cache, transformers refuses a hybrid without an attention layer.
    loss = model(**inputs, use_cache=False, **kwargs).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def lean_copy(model: nn.Module, options: LeanOptions | None = None) -> nn.Module:
    lean = copy.deepcopy(model)
    apply_lean(lean, options)
    return lean


@pytest.fixture
def assert_same_step() -> Callable[..., None]:
    """Assert that loss and every gradient of a lean step are within 1e-5 of the plain one."""

    def check(plain: nn.Module, options: LeanOptions, inputs: dict[str, Any], **kwargs: Any) -> None:
        loss, gradients = step(plain, inputs, **kwargs)
        lean_loss, lean_gradients = step(lean_copy(plain, options), inputs, **kwargs)
        assert abs(lean_loss - loss) <= 1e-5 * abs(loss)
        assert lean_gradients.keys() == gradients.keys()
        # A gradient that cancels to nothing (keys of a sequence of two tokens) is rounding in both: the second term.
        noise = 1e-8 * max(g.norm().item() for g in gradients.values())
        for name, expected in gradients.items():
            assert (lean_gradients[name] - expected).norm() <= 1e-5 * expected.norm() + noise, name

    return check
