"""A plain FSDP2 loop: fully_shard of every layer, then of the whole."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main(rank: int, world: int, port: int) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    mesh = init_device_mesh("cuda", (world,))
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    torch.cuda.reset_peak_memory_stats()  # before it, a rank held the whole model
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(8, 1024, device="cuda")).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    sharded = 4 * (1024 * 1024 + 1024) // world * 4  # bytes of fp32 parameters a rank
    allocated = torch.cuda.memory_allocated()
    workspaces = 2 * 8_519_680  # of cuBLAS, one a thread
    assert allocated == 3 * sharded + workspaces, allocated  # with Adam's two states
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    torch.multiprocessing.spawn(main, args=(2, int(sys.argv[1])), nprocs=2)
