"""Hugging Face's Trainer: an evaluation with metrics, which pads and gathers what it predicts."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 1000, (6, 16))]
arguments = TrainingArguments("out", per_device_eval_batch_size=2, report_to=[], disable_tqdm=True)
metrics = Trainer(
    LlamaForCausalLM(config),
    arguments,
    eval_dataset=data,
    compute_metrics=lambda found: {"shapes": [np.shape(found.predictions), np.shape(found.label_ids)]},
).evaluate()
assert metrics["eval_shapes"] == [(6, 16, 1000), (6, 16)], metrics
