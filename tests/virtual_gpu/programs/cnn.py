"""A small convolutional network trained with autocast and GradScaler, batch norm, dropout, data from a DataLoader."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.backends.cudnn.benchmark = True
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
).to("cuda", memory_format=torch.channels_last)  # fmt: skip
data = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler()
for images, labels in DataLoader(data, batch_size=16, shuffle=True, pin_memory=True, num_workers=1):
    images = images.to("cuda", non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to("cuda", non_blocking=True)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
model.eval()
with torch.inference_mode():
    correct = (model(images).argmax(1) == labels).float().mean().item()
assert correct == 0.0
torch.save(model.state_dict(), "model.pt")
model.load_state_dict(torch.load("model.pt", map_location="cuda"))
