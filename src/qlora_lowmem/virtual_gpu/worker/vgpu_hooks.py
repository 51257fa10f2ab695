"""What differs in Python on a virtual GPU. Installed when a program imports torch; nothing else is changed.

Values do not exist here: copies from the device read zeros, so `.item()` is 0, `bool(tensor)` is False, `isnan` is
False, and control flow that depends on them takes that branch. Where a *shape* depends on values, the worst case is
taken where there is one. `values.toml` lists all of it.
"""

import atexit
import ctypes
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import ModuleType
from typing import Any, NoReturn

# Peaks in bytes, (allocated, reserved) by device, of what was counted before the last reset.
_folded: list[list[int]] = []


def _fold_peaks(torch: Any) -> None:
    """Takes the allocator's peaks into ours: before the program resets them, and at the end."""
    if not torch.cuda.is_initialized():
        return
    for device in range(torch.cuda.device_count()):
        if device == len(_folded):
            _folded.append([0, 0])
        peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        _folded[device] = [max(old, new) for old, new in zip(_folded[device], peaks, strict=True)]


def _write_report(torch: Any, ended: bool) -> None:
    _fold_peaks(torch)
    if not _folded:
        return
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    text = json.dumps({"peaks": _folded, "versions": versions, "ended": ended})
    account = os.environ.get("VGPU_ACCOUNT")
    if not account:
        print("virtual GPU: VGPU_ACCOUNT is gone from the environment; this process' peaks are lost", file=sys.stderr)
        return
    path = f"{os.path.dirname(account)}/torch-{os.getpid()}.json"  # noqa: PTH120
    try:
        with open(f"{path}.part", "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        os.replace(f"{path}.part", path)  # noqa: PTH105
    except FileNotFoundError:
        return  # the launcher is gone, and nobody reads it
    except OSError as error:
        print(f"virtual GPU: this process' peaks could not be written to {path}: {error.strerror}", file=sys.stderr)


def _report_at_the_end(torch: Any) -> None:
    """Writes the report however the process ends, short of being killed."""
    atexit.register(_write_report, torch, True)
    leave: Callable[[int], NoReturn] = os._exit

    def leave_with_report(status: int) -> NoReturn:
        _write_report(torch, True)
        leave(status)

    os._exit = leave_with_report
    os.register_at_fork(after_in_child=_folded.clear)


def _report_before_resets(torch: Any) -> None:
    for name in ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats"):
        reset = getattr(torch._C, name, None)
        if reset is None:
            continue

        def report_and_reset(*arguments: Any, _reset: Callable[..., Any] = reset) -> Any:
            _write_report(torch, False)
            return _reset(*arguments)

        setattr(torch._C, name, report_and_reset)


def _report_when_initialized(torch: Any) -> None:
    """Leaves a first report once CUDA is in use, so that a killed process is known to have had more."""
    initialize = torch.cuda._lazy_init

    def initialize_and_report() -> None:
        was = torch.cuda._initialized
        initialize()
        if not was and torch.cuda._initialized:
            _write_report(torch, False)

    torch.cuda._lazy_init = initialize_and_report


def _take_the_worst_case(torch: Any) -> None:
    """Replaces the operators whose result's size depends on values."""

    def indices(count: int, like: Any) -> Any:
        return torch.empty(count, dtype=torch.long, device=like.device)

    def nonzero(mask: Any) -> Any:
        return torch.empty((mask.numel(), mask.dim()), dtype=torch.long, device=mask.device)

    def unique(tensor: Any, _sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> Any:
        count = tensor.numel()
        inverse = indices(count, tensor).view(tensor.shape) if return_inverse else indices(0, tensor)
        return torch.empty_like(tensor).view(-1), inverse, indices(count if return_counts else 0, tensor)

    def unique_values(tensor: Any, _sorted: bool = True, return_inverse: bool = False) -> Any:
        return unique(tensor, True, return_inverse)[:2]

    def unique_dim(tensor: Any, dim: int, *_options: bool) -> Any:
        count = tensor.size(dim)
        return torch.empty_like(tensor), indices(count, tensor), indices(count, tensor)

    def unique_consecutive(
        tensor: Any, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
    ) -> Any:
        return unique(tensor, True, return_inverse, return_counts) if dim is None else unique_dim(tensor, dim)

    def repeat_interleave(repeats: Any, *, output_size: int | None = None) -> Any:
        return indices(repeats.numel() if output_size is None else output_size, repeats)

    operators = {
        "nonzero": nonzero,
        "_unique": unique_values,
        "_unique2": unique,
        "unique_consecutive": unique_consecutive,
        "unique_dim": unique_dim,
        "repeat_interleave.Tensor": repeat_interleave,
    }
    library = torch.library.Library("aten", "IMPL")
    for name, operator in operators.items():
        library.impl(name, operator, "CUDA", allow_override=True)
    _keep.append(library)  # the registration lives as long as its library


_keep: list[Any] = []


def _asked_of_weights(fweights: Any = None, aweights: Any = None, **_: Any) -> int:
    """Once of each kind, and once of their sum."""
    given = (fweights is not None) + (aweights is not None)
    return given + 1 if given else 0


# Operators that ask whether all values are valid (finite, not negative, of the right sum), and fail on the zero: how
# often they ask, by the options that they get. What they ask after that is whether something went wrong.
_VALIDATE: dict[tuple[str, str], Callable[..., int]] = {
    ("linalg_eig", "CUDA"): lambda **_: 1,
    ("linalg_eig.out", "CUDA"): lambda **_: 1,
    ("segment_reduce", "CUDA"): lambda **_: 2,
    ("cov", "CUDA"): _asked_of_weights,
    ("cov", "AutogradCUDA"): _asked_of_weights,
}


def _let_values_be_valid(torch: Any) -> None:
    """Answers yes where an operator in C++ asks about its values; refuses by name one that looks for a value."""
    library = torch.library.Library("aten", "IMPL")
    answer_yes = ctypes.CDLL(None).vgpu_answer_yes

    def replace(name: str, key: str, kernel: Any, around: Callable[..., Any]) -> None:
        def operator(keys: Any, *arguments: Any, **options: Any) -> Any:
            return around(lambda: kernel.call_boxed(keys, *arguments, **options), options)

        library.impl(name, operator, key, with_keyset=True, allow_override=True)

    def answering(times: Callable[..., int], call: Callable[[], Any], options: dict[str, Any]) -> Any:
        answer_yes(times(**options))
        try:
            return call()
        finally:
            answer_yes(0)

    def refusing(call: Callable[[], Any], _options: dict[str, Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            if "INTERNAL ASSERT" not in str(error):
                raise
            raise NotImplementedError(
                "torch.mode of more than 2,048 values a row looks for the one it has found, and on a virtual GPU there "
                "are no values"
            ) from None

    wanted: dict[tuple[str, str], Callable[..., Any]] = {
        where: partial(answering, times) for where, times in _VALIDATE.items()
    } | {("mode", "CUDA"): refusing}
    # All of them before the first is replaced: one may lead to another.
    kernels = {(name, key): torch.library.get_kernel(f"aten::{name}", key) for name, key in wanted}
    for (name, key), around in wanted.items():
        replace(name, key, kernels[name, key], around)
    _keep.append(library)


def _wait_for_the_threads_of_backward(torch: Any) -> None:
    """Lets a backward pass return only when autograd's threads have let go of what it held.

    The engine wakes its caller first and drops the finished pass after that: gradients that `torch.autograd.grad` was
    asked for, what hooks hold, all that an error left. It takes microseconds, which the caller needs too, so its next
    allocation came before or after, and the peak was one of two. A card's run shows mostly the lower one; here it
    always does. A second pass waits until each thread is free again: over one empty tensor, so it runs no operator and
    allocates nothing.
    """
    probes: dict[int, tuple[Any, Any]] = {}

    def probe_of(device: int) -> tuple[Any, Any]:
        if device not in probes:
            with torch.utils._python_dispatch._disable_current_modes(), torch.inference_mode(False):
                leaf = torch.empty(0, device=torch.device("cuda", device), requires_grad=True)
                probes[device] = leaf, leaf.detach()
        return probes[device]

    class Engine(torch._C._ImperativeEngine):  # type: ignore[misc]
        def run_backward(self, *arguments: Any, **options: Any) -> Any:
            try:
                return super().run_backward(*arguments, **options)
            finally:
                self._wait()

        def _wait(self) -> None:
            nested = (
                torch._C._current_graph_task_id() != -1 and threading.current_thread() is not threading.main_thread()
            )
            if nested or not torch.cuda.is_initialized():
                return  # a pass inside one of autograd's threads ends before it goes on
            for device in filter(torch._C._cuda_hasPrimaryContext, range(torch.cuda.device_count())):
                leaf, gradient = probe_of(device)
                super().run_backward((leaf,), (gradient,), True, False, (leaf,), True, False)

    torch.autograd.Variable._execution_engine = Engine()


# Whether a batch has no padding; whether the parameters of a distribution and what is drawn from it are valid.
_ASK_FOR_VALIDITY = ("transformers", "torch.distributions")


def _all_is_true_for_libraries(torch: Any) -> None:
    def true_for_libraries(ask: Callable[..., Any]) -> Callable[..., Any]:
        def all_of(*arguments: Any, **options: Any) -> Any:
            answer = ask(*arguments, **options)
            if len(arguments) != 1 or options or not arguments[0].is_cuda:
                return answer
            asked_by = str(sys._getframe(1).f_globals.get("__name__", ""))
            return torch.ones((), dtype=torch.bool) if asked_by.startswith(_ASK_FOR_VALIDITY) else answer

        return all_of

    torch.Tensor.all = true_for_libraries(torch.Tensor.all)
    torch.all = true_for_libraries(torch.all)
    torch._is_all_true = true_for_libraries(torch._is_all_true)


def _on_the_machine() -> bool:
    """Whether the preloaded libraries are in this process; tells them that the hooks are, too."""
    try:
        ctypes.CDLL(None).vgpu_hooks_are_in()
    except AttributeError:
        print(
            "virtual GPU: LD_PRELOAD was changed on the way to this process, so it is not on the virtual machine: "
            "PyTorch finds no card here. Start it with the LD_PRELOAD that it would have inherited.",
            file=sys.stderr,
        )
        return False
    return True


def _hook_torch(torch: ModuleType) -> None:
    if torch.version.cuda is None or not _on_the_machine():
        return
    _report_at_the_end(torch)
    _report_before_resets(torch)
    _report_when_initialized(torch)
    _take_the_worst_case(torch)
    _let_values_be_valid(torch)
    _wait_for_the_threads_of_backward(torch)
    _all_is_true_for_libraries(torch)


def _hook_triton(jit: ModuleType) -> None:
    launched = getattr(ctypes.CDLL(None), "vgpu_launched", int)  # the second in a process that lost LD_PRELOAD

    def launch_nothing(*_arguments: Any, **options: Any) -> None:
        if not options.get("warmup"):  # which compiles, and launches nothing
            launched()

    jit.JITFunction.run = launch_nothing


def _hook_benchmarking(benchmarking: ModuleType) -> None:
    for kind in vars(benchmarking).values():
        if isinstance(kind, type) and issubclass(kind, benchmarking.Benchmarker):
            _leave_out_of_launches(kind, ("benchmark_gpu", "benchmark_gpu_with_cuda_graph"))


def _hook_triton_testing(testing: ModuleType) -> None:
    _leave_out_of_launches(testing, ("do_bench", "do_bench_cudagraph"))


def _leave_out_of_launches(owner: Any, names: Sequence[str]) -> None:
    """A tuner repeats what it times for as long as it may, so that how often depends on the machine."""
    tune = getattr(ctypes.CDLL(None), "vgpu_tune", int)

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def tuned(*arguments: Any, **options: Any) -> Any:
            tune(1)
            try:
                return plain(*arguments, **options)
            finally:
                tune(-1)

        return tuned

    for name in names:
        if name in vars(owner):
            setattr(owner, name, wrap(vars(owner)[name]))


def _hook_distributed(c10d: ModuleType) -> None:
    if hasattr(c10d, "barrier"):  # not in a build without torch.distributed
        importlib.import_module("vgpu_distributed").hook(c10d)


def _hook_masking(masking: ModuleType) -> None:
    """`fast_all` asks whether a mask has no padding; on a card it would read zero, and an (S, S) mask be built."""
    asked = getattr(masking, "fast_all", None)
    if asked is None:  # transformers before 5.23 asks `Tensor.all`, which has its own hook
        return

    def fast_all(mask: Any) -> Any:
        return True if mask.is_cuda else asked(mask)

    masking.fast_all = fast_all  # type: ignore[attr-defined]


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.masking_utils": _hook_masking,
    "torch": _hook_torch,
    "torch._inductor.runtime.benchmarking": _hook_benchmarking,
    "torch.distributed.distributed_c10d": _hook_distributed,
    "triton.runtime.jit": _hook_triton,
    "triton.testing": _hook_triton_testing,
}
