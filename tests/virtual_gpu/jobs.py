"""What the tests run on virtual cards; each function is one process' whole program and returns what JSON can hold."""

import os
import signal
import sys
import time
from typing import Any

MIB = 2**20


def matmul_step(size: int) -> dict[str, int]:
    import torch

    weight = torch.randn(size, size, device="cuda", requires_grad=True)
    loss = (torch.randn(size, size, device="cuda") @ weight).relu().sum()
    loss.backward()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def peak_then_reset(mib: int) -> int:
    import torch

    tensor = torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
    del tensor
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def peaks_while_autograds_thread_is_the_last_to_run(rounds: int) -> list[int]:
    """Gradients are asked for and dropped, then memory is taken; peaks in MiB.

    Autograd's thread gets the only processor when nobody else wants it: never just after it has woken this one.
    """
    import threading

    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    leaf = torch.zeros(2 * MIB, device="cuda", requires_grad=True)
    output, threads = leaf * 2, []
    gradient = torch.ones_like(output)
    output.register_hook(lambda _gradient: threads.append(threading.get_native_id()))
    torch.autograd.grad(output, leaf, gradient, retain_graph=True)
    os.sched_setscheduler(threads[0], os.SCHED_IDLE, os.sched_param(0))
    peaks = []
    for _ in range(rounds):
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(output, leaf, gradient, retain_graph=True)
        torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        peaks.append(torch.cuda.max_memory_allocated() // MIB)
    return peaks


def out_of_memory(mib: int) -> dict[str, Any]:
    """Takes pieces of `mib` until torch says no."""
    import torch

    pieces = []
    try:
        while True:
            pieces.append(torch.empty(mib * MIB, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError as error:
        return {"pieces": len(pieces), "message": str(error), "free": torch.cuda.mem_get_info()[0]}


def memory_fraction() -> str:
    import torch

    torch.cuda.set_per_process_memory_fraction(0.25)
    held = torch.empty(1400 * MIB, dtype=torch.uint8, device="cuda")
    try:
        held.new_empty(400 * MIB)
    except torch.cuda.OutOfMemoryError as error:
        return str(error)
    return ""


def nvml_and_torch() -> dict[str, Any]:
    import pynvml
    import torch

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    tensor = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return {
        "before": before,
        "used": memory.used,
        "total": memory.total,
        "process_used": process.usedGpuMemory,
        "is_this_process": process.pid == os.getpid(),
        "torch_used": torch.cuda.device_memory_used(),
        "name": pynvml.nvmlDeviceGetName(handle),
        "same_handle": pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(handle))),
        "held": tensor.numel(),
    }


def compile_cache() -> str:
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert not os.path.exists(folder)  # noqa: PTH110
    os.mkdir(folder)  # noqa: PTH102
    return folder


def values() -> dict[str, Any]:
    import torch

    ones = torch.ones(4, device="cuda")
    mask = torch.zeros(10, dtype=torch.bool, device="cuda")
    host = torch.arange(4.0)
    return {
        "item": ones.sum().item(),
        "masked": ones.new_empty(10)[mask].numel(),
        "unique": torch.unique(torch.zeros(7, device="cuda")).numel(),
        "all": bool(mask.all()),
        "host_copy": host.clone().pin_memory().tolist(),
        "pinned": host.pin_memory().is_pinned(),
    }


def pinned_round_trip() -> list[float]:
    """A device-to-host copy into pinned memory that held something else."""
    import torch

    host = torch.full((3 * MIB,), 7.0).pin_memory()
    host[1 : MIB + 5].copy_(torch.ones(MIB + 4, device="cuda"), non_blocking=True)
    return [host[0].item(), host[1].item(), host[MIB + 4].item(), host[MIB + 5].item(), host[-1].item()]


def device_and_host_pointers() -> dict[str, Any]:
    import torch

    first = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda").data_ptr()
    cudart = torch.cuda.cudart()
    return {"first": first, "host_is_pinned": torch.empty(4).is_pinned(), "runtime": cudart is not None}


def expandable_segments() -> dict[str, int]:
    import torch

    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    pieces = [torch.empty(100 * MIB, dtype=torch.uint8, device="cuda") for _ in range(10)]
    reserved = torch.cuda.memory_reserved()
    segments = torch.cuda.memory._snapshot()["segments"]
    del pieces
    torch.cuda.empty_cache()
    return {"reserved": reserved, "after": torch.cuda.memory_reserved(), "segments": len(segments)}


def refused_graph() -> str:
    import torch

    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.ones(1, device="cuda")
    except RuntimeError as error:
        return str(error)
    return ""


def convolution() -> int:
    """Peak of a convolution of 4 MiB to 4 MiB with its gradients: 36 bytes of weights are rounded to 512."""
    import torch

    image = torch.ones(1, 1, 1024, 1024, device="cuda", requires_grad=True)
    weight = torch.ones(1, 1, 3, 3, device="cuda", requires_grad=True)
    torch.nn.functional.conv2d(image, weight, padding=1).backward(torch.ones_like(image))
    return torch.cuda.max_memory_allocated()


def refused_sparsity() -> str:
    import torch

    try:
        torch.sparse.to_sparse_semi_structured(torch.zeros(128, 128, dtype=torch.float16, device="cuda"))
    except RuntimeError as error:
        return str(error)
    return ""


def attention(backend: str, batch: int, heads: int, seq: int, head_dim: int) -> dict[str, int]:
    """What attention keeps for its backward pass, and the peak of that, in bytes beside the inputs."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (batch, heads, seq, head_dim)
    query, key, value = (torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(getattr(SDPBackend, backend)):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    kept = torch.cuda.memory_allocated() - before
    output.backward(torch.empty_like(output))
    return {"kept": kept, "peak": torch.cuda.max_memory_allocated() - before}


def default_attention() -> str:
    import torch

    query = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return type(torch.nn.functional.scaled_dot_product_attention(query, query, query).grad_fn).__name__


def recurrent(kind: str) -> dict[str, int]:
    """A network's weights in bytes, as cuDNN lays them out and as PyTorch counts them."""
    import torch

    network = getattr(torch.nn, kind)(16, 32, num_layers=2, bidirectional=True, device="cuda")
    addresses = sorted(weight.data_ptr() for weight in network.parameters())
    last = max(network.parameters(), key=lambda weight: weight.data_ptr())
    return {
        "spanned": addresses[-1] + last.numel() * 4 - addresses[0],
        "counted": sum(weight.numel() for weight in network.parameters()) * 4,
    }


def managed() -> int:
    """Managed memory, as paged optimizers take it: through the runtime itself."""
    import ctypes

    import torch

    torch.cuda.init()
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    address = ctypes.c_void_p()
    status: int = runtime.cudaMallocManaged(ctypes.byref(address), ctypes.c_size_t(5 * MIB), 1)
    ctypes.memset(address, 1, 5 * MIB)  # the host may write it
    runtime.cudaFree(address)
    return status


def fail(message: str) -> None:
    raise ValueError(message)


def leave(code: int) -> None:
    import torch

    torch.ones(1, device="cuda")
    sys.exit(code)


def hold_and_sleep(seconds: float) -> None:
    import torch

    torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
    time.sleep(seconds)


def kill_itself() -> None:
    import torch

    torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)


def card() -> str | None:
    from qlora_lowmem.virtual_gpu import current_card

    here = current_card()
    return None if here is None else f"{here.name} {here.total_bytes}"


def properties() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": list(torch.cuda.get_device_capability()),
        "total": found.total_memory,
        "sms": found.multi_processor_count,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def not_json() -> object:
    return object()


def evaluate(given: str, expressions: list[str]) -> dict[str, str]:
    """What each expression gives, with the names that the statements in `given` make."""
    import torch

    names = {"torch": torch}
    exec(given, names)
    answers = {}
    for expression in expressions:
        try:
            answers[expression] = repr(eval(expression, names))
        except RuntimeError as error:
            answers[expression] = f"{type(error).__name__}: {error}"
    return answers


def out_of_memory_while_loading(mib: int) -> str:
    """Moves a state dict to the card, tensor by tensor, until it is full."""
    import torch

    state = {str(layer): torch.empty(mib * MIB, dtype=torch.uint8, device="meta") for layer in range(100)}
    try:
        loaded = {name: torch.empty_like(tensor, device="cuda") for name, tensor in state.items()}
    except torch.cuda.OutOfMemoryError as error:
        return str(error)
    return f"{len(loaded)} tensors fit"


def launches_of(given: str, statements: list[str]) -> dict[str, list[int]]:
    """Kernels, copies and memsets of each statement, run a second time: what is made once has been made."""
    import torch

    from qlora_lowmem.virtual_gpu import launches

    names = {"torch": torch}
    exec(given, names)
    counts = {}
    for statement in statements:
        exec(statement, names)
        before = launches.of_this_process()
        exec(statement, names)
        after = launches.of_this_process()
        assert before is not None
        assert after is not None
        found = after - before
        counts[statement] = [found.kernels, found.copies, found.memsets]
    return counts


def launches_of_a_child_and_a_fork() -> dict[str, list[int]]:
    """A program of its own launches three kernels and ends; a fork of this process, which has a context, none."""
    import subprocess

    import torch

    from qlora_lowmem.virtual_gpu import launches

    tensor = torch.ones(1, device="cuda")
    began = launches.of_this_process(), launches.of_all_processes()
    program = "import torch; tensor = torch.ones(1, device='cuda'); (tensor + tensor) * tensor"
    subprocess.run([sys.executable, "-c", program], check=True)
    if os.fork() == 0:
        os._exit(int(launches.of_this_process() != launches.Launches()))
    _, code = os.wait()
    tensor.add_(1)
    ended = launches.of_this_process(), launches.of_all_processes()
    mine, everyone = (
        after.kernels - before.kernels
        for before, after in zip(began, ended, strict=True)
        if before is not None and after is not None
    )
    return {"kernels": [mine, everyone], "exit code of the fork": [code]}


def fork_after_use() -> str:
    import torch

    torch.ones(1, device="cuda")
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            torch.ones(1, device="cuda")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    message = os.read(read, 4096).decode()
    os.wait()
    return message


def remove_the_report() -> None:
    import shutil

    shutil.rmtree(os.path.dirname(os.environ["VGPU_ACCOUNT"]))  # noqa: PTH120


def empty_the_environment() -> None:
    import torch

    torch.ones(1, device="cuda")
    os.environ.clear()


def load_and_use(library: str, called: str | None) -> None:
    import ctypes

    import torch

    loaded = ctypes.CDLL(library)
    torch.ones(1, device="cuda")
    if called is not None:
        assert [loaded[called](), loaded[called]()] == [801, 801]


def leave_a_process() -> int:
    import subprocess

    return subprocess.Popen(["sleep", "60"]).pid


def leave_an_orphan() -> int:
    """A process without an environment, in a session of its own, whose parent is gone."""
    import subprocess

    shell = "setsid env -i sleep 60 >/dev/null 2>&1 & echo $!"
    return int(subprocess.check_output(["/bin/sh", "-c", shell], env={}))


def host_values_sent_around() -> dict[str, list[Any]]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    host = torch.tensor([5, 6])
    never_sent, sent, computed = host.cuda(), host.cuda(), host.cuda()
    dist.broadcast(sent, src=0)
    answers = {"sent": sent.tolist(), "part": sent[1:].tolist(), "never sent": never_sent.tolist()}
    factor, product = torch.ones(2, 2).cuda(), torch.ones(2, 2).cuda()
    torch.mm(factor, factor, out=product)
    answers["multiplied since"] = product.tolist()
    dist.broadcast(computed, src=0)
    computed.add_(1)
    answers["computed since"] = computed.tolist()
    reduced = host.cuda()
    dist.broadcast(reduced, src=0)
    dist.all_reduce(reduced)
    answers["reduced since"] = reduced.tolist()
    dist.destroy_process_group()
    return answers
