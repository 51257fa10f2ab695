"""A loop as Accelerate's examples write it: accumulation, mixed precision, gather; nothing of this project."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = torch.randint(0, 500, (8, 64))
loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
steps = 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            steps += 1
        optimizer.step()
        optimizer.zero_grad()
    accelerator.gather_for_metrics(loss.detach())
print(f"device={accelerator.device} steps={steps} allocated={torch.cuda.max_memory_allocated()}")
