"""Hugging Face's Trainer: full fine-tuning of a tiny Llama."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 1000, (8, 64))]
arguments = TrainingArguments(
    "out", per_device_train_batch_size=2, max_steps=3, bf16=True, gradient_checkpointing=True, logging_steps=1,
    save_strategy="no", report_to=[], disable_tqdm=True, optim="adamw_torch_fused", eval_strategy="steps", eval_steps=3,
)  # fmt: skip
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, eval_dataset=data[:2])
result = trainer.train()
assert result.training_loss == 0.0, result
