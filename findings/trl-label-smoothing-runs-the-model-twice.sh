#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0: `label_smoothing_factor` makes every micro-batch of SFTTrainer run the model
# twice, with the whole logits, and silently drops the router loss of a mixture of experts.
#
# Label smoothing is thought to change a few operations of the loss. SFTTrainer computes its loss from per-token
# log-probabilities that never hold the logits of all rows; with smoothing it asks the model for all logits, and then
# runs the whole model a second time without gradients, for entropy and accuracy in the log. The router's auxiliary loss,
# asked for with `output_router_logits` and a coefficient, is logged in both cases, and is no part of the loss with
# smoothing: the router learns as if the coefficient were 0.
#
# Seen (2026-12-01, Python 3.11), one step of a Qwen 3 mixture:
#   smoothing 0.0: 1 forward pass, the coefficient changes the gradient of the router: True, aux_loss logged: True
#   smoothing 0.1: 2 forward passes, the coefficient changes the gradient of the router: False, aux_loss logged: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0 accelerate==1.15.0 trl==1.16.0 datasets==5.2.0
cat > "$folder/smooth.py" <<'PY'
import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

os.chdir(sys.argv[1])
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")), eos_token="w1", pad_token="w0"
)


def step(smoothing: float, coefficient: float) -> tuple[int, torch.Tensor, bool]:
    """One step: how often the model ran, the router's gradient in it, and whether a router loss was logged."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        output_router_logits=True, router_aux_loss_coef=coefficient,
    ))
    passes, gradients = [], []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    router = next(weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight"))
    router.register_post_accumulate_grad_hook(lambda weight: gradients.append(weight.grad.clone()))
    settings = SFTConfig(
        output_dir="out", max_steps=1, per_device_train_batch_size=1, label_smoothing_factor=smoothing, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False, max_length=16,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"input_ids": list(range(2, 18))}])
    made = SFTTrainer(model, settings, train_dataset=rows, processing_class=words)
    made.train()
    return len(passes), gradients[0], any("aux_loss" in line for line in made.state.log_history)


for smoothing, expected in ((0.0, (1, True)), (0.1, (2, False))):
    passes, without, _ = step(smoothing, 0.0)
    _, with_router, logged = step(smoothing, 1.0)
    changes = not torch.equal(without, with_router)
    print(f"smoothing {smoothing}: {passes} forward pass{'es' * (passes > 1)}, the coefficient changes the gradient of the "
          f"router: {changes}, aux_loss logged: {logged}")
    assert (passes, changes, logged) == (*expected, True)
PY
"$folder/venv/bin/python" -W ignore "$folder/smooth.py" "$folder" 2>/dev/null | grep -v '^{'
echo "as described"
