"""The loop of Accelerate's documentation, a causal language model instead of its ResNet."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model = torch.nn.Sequential(
    torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1000)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
loader = DataLoader(TensorDataset(torch.randint(0, 1000, (16, 32))), batch_size=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for epoch in range(2):
    for (ids,) in loader:
        with accelerator.accumulate(model):
            logits = model(ids)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    losses = accelerator.gather_for_metrics(loss.repeat(4))
    accelerator.print(f"epoch {epoch}: {losses.mean().item()}")
accelerator.wait_for_everyone()
