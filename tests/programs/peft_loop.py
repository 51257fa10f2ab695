"""A plain loop as PEFT's examples write it: a model from a folder, LoRA, AdamW, a schedule; nothing of this project."""

import sys

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

folder = sys.argv[1]
device = "cuda"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"]))
model.print_trainable_parameters()
model = model.to(device)
tokens = torch.randint(0, 500, (8, 64))
loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=2, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=len(loader))
model.train()
total_loss = 0.0
for batch in loader:
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    loss = model(**batch).loss
    total_loss += loss.detach().float().item()
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
print(f"steps={len(loader)} allocated={torch.cuda.max_memory_allocated()}")
