#!/usr/bin/env bash
# transformers 5.23.0: gradient accumulation multiplies the router loss of a mixture of experts; TRL 1.16.0 divides it.
#
# Since `num_items_in_batch`, a micro-batch's loss is divided by the tokens of the whole batch inside of the model, and
# the trainer no longer divides by the number of micro-batches. The router's auxiliary loss is added after that division,
# whole, once a micro-batch: at 4 micro-batches it weighs 4 times what `router_aux_loss_coef` says, in the gradient and
# in the loss that is logged. TRL's SFTTrainer, on the same transformers, adds a fourth of it. Accumulation is thought to
# be neutral; here it changes the objective, and moving from one trainer to the other changes it too.
#
# Seen (2026-12-01, Python 3.11), the same four equal samples in one step, a Qwen 3 mixture with a coefficient of 1:
#   Trainer    4 x 1: loss 6.18, router loss in it 2.0
#   Trainer    1 x 4: loss 12.20, router loss in it 8.0
#   SFTTrainer 4 x 1: loss 6.18, router loss in it 2.0
#   SFTTrainer 1 x 4: loss 6.18, router loss in it 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0 accelerate==1.15.0 trl==1.16.0 datasets==5.2.0
cat > "$folder/step.py" <<'PY'
import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

os.chdir(sys.argv[1])
ids = list(range(2, 18))
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")), eos_token="w1", pad_token="w0"
)


def loss(trainer: str, batch: int, micro_batches: int, coefficient: float) -> float:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        output_router_logits=True, router_aux_loss_coef=coefficient,
    ))
    common = dict(
        output_dir="out", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=micro_batches,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False,
    )
    if trainer == "Trainer":
        rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * 16, "labels": ids}] * 4)
        made = Trainer(model, TrainingArguments(**common), train_dataset=rows)
    else:
        rows = Dataset.from_list([{"input_ids": ids}] * 4)
        made = SFTTrainer(model, SFTConfig(**common, max_length=16, gradient_checkpointing=False), train_dataset=rows,
                          processing_class=words)
    made.train()
    return next(line["loss"] for line in made.state.log_history if "loss" in line)


found = {}
for trainer in ("Trainer", "SFTTrainer"):
    for batch, micro_batches in ((4, 1), (1, 4)):
        with_router = loss(trainer, batch, micro_batches, 1.0)
        router = with_router - loss(trainer, batch, micro_batches, 0.0)
        print(f"{trainer:10} {batch} x {micro_batches}: loss {with_router:.2f}, router loss in it {router:.1f}")
        found[trainer, micro_batches] = router
once = found["Trainer", 1]
assert abs(found["Trainer", 4] / once - 4) < 0.02, found
assert abs(found["SFTTrainer", 1] / once - 1) < 0.02 and abs(found["SFTTrainer", 4] / once - 1) < 0.02, found
PY
"$folder/venv/bin/python" -W ignore "$folder/step.py" "$folder" 2>/dev/null | grep -v '^{'
echo "as described"
