"""A plain DistributedDataParallel loop, as PyTorch's tutorial has it."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
model = DistributedDataParallel(model, device_ids=[rank])
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    model(torch.randn(8 * (rank + 1), 1024, device="cuda")).sum().backward()
    # The process group's watchdog, a thread that wakes every 100 ms, holds reduced buckets until it has looked at them:
    # DDP makes new ones in its second forward, and without this pause both may be there.
    time.sleep(1)
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    Path("written").write_text("by rank 0")
dist.barrier()
assert Path("written").read_text() == "by rank 0", "a barrier that does not hold"
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, {"rank": rank})
assert ranks == [{"rank": 0}, {"rank": 1}], ranks
plan = ["a plan"] if rank == 0 else [None]
dist.broadcast_object_list(plan, src=0)
assert plan == ["a plan"], plan
if rank == 0:
    dist.send_object_list(["a parcel"], dst=1)
else:
    parcel = [None]
    dist.recv_object_list(parcel, src=0)
    assert parcel == ["a parcel"], parcel
dist.destroy_process_group()
