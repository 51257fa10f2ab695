"""AdamW with its state in a dtype of its own, stepped one weight at a time, after backward or within it.

State in fp32 beside bf16 adapters is the exact choice. In bf16 the second moment never falls: beta2 = 0.999 takes a
thousandth off it, less than half of the 1/128 to 1/256 between two neighbours, so `v * 0.999` rounds back to `v`.

Gradient release: each weight is stepped as soon as backward has completed its gradient, which is freed at once, so the
gradients of all adapters never exist together (PyTorch's tutorial "How to save memory by fusing the optimizer step into
the backward pass"; the term is that of the library `optimi`). For rank 8 on all linear layers of Granite-4.0-H-1B they
are 8.9 million, 17 MiB in bf16. Lean layers give a segment's gradients together, so one segment's exist at a time.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora_lowmem.recipe import Recipe

_MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2) as `torch.optim.AdamW`
    computes it (torch/optim/adam.py, `_single_tensor_adam`), without amsgrad; its `state_dict` is that one's too.

    Where weight, gradient and state have one dtype, the arithmetic is in it, bit by bit torch's; else it is in fp32,
    and what is kept is rounded once a step.

    Args:
        state_dtype: of both moments; None is each weight's own.
        gradient_release: step within backward. Each weight's gradient must be complete after one backward.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | None = None,
        gradient_release: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype
        self.gradient_release = gradient_release
        self._steps = True
        self.half_stepped = False  # a backward has stepped weights, `step` has not followed: others lack theirs
        if gradient_release:
            for index, group in enumerate(self.param_groups):
                for parameter in group["params"]:
                    parameter.register_post_accumulate_grad_hook(partial(_release, weakref.ref(self), index))

    @contextmanager
    def without_steps(self) -> Iterator[None]:
        """Inside, backward frees the gradients as it does in a step, and leaves weights and state as they are."""
        self._steps = False
        try:
            yield
        finally:
            self._steps = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every weight that has a gradient: after a backward with gradient release, none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group)
        self.half_stepped = False
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this optimizer or of `torch.optim.AdamW`; moments come in this one's dtype, without a detour by the
        weight's, which `Optimizer.load_state_dict` takes. `ValueError` if the groups are not those of this optimizer.
        """
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number)
            if saved:
                kept = {"device": parameter.device, "dtype": self.state_dtype or parameter.dtype}
                # The count stays on the host: it is read at each step.
                step = torch.as_tensor(saved["step"], dtype=torch.float32).cpu()
                self.state[parameter] = {"step": step, **{name: saved[name].to(**kept) for name in _MOMENTS}}

    @torch.no_grad()
    def release(self, parameter: Tensor, group: int) -> None:
        """Step a weight of the group of that number, whose gradient is complete, and let the gradient go."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and self._steps:
            self.half_stepped = True
            self._step_one(parameter, gradient, self.param_groups[group])

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({name: torch.zeros_like(parameter, dtype=self.state_dtype) for name in _MOMENTS})
        state["step"] += 1
        count, (beta1, beta2), rate = state["step"].item(), group["betas"], group["lr"]
        kept = [parameter, state["exp_avg"], state["exp_avg_sq"]]
        alike = all(each.dtype == gradient.dtype for each in kept)
        # `float` is the tensor itself where that is fp32.
        weight, mean, square = kept if alike else [each.float() for each in kept]
        gradient = gradient if alike else gradient.float()
        if group["weight_decay"]:
            weight.mul_(1 - rate * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
        weight.addcdiv_(mean, root, value=-(rate / (1 - beta1**count)))
        for each, stepped in zip(kept, (weight, mean, square), strict=True):
            if each is not stepped:
                each.copy_(stepped)


def _release(optimizer: "weakref.ref[AdamW]", group: int, parameter: Tensor) -> None:
    """What backward calls. Python's collector does not see a tensor's hooks, so the optimizer is not held by them."""
    own = optimizer()
    if own is not None:
        own.release(parameter, group)


def adamw_of(recipe: Recipe) -> tuple[type[AdamW], dict[str, Any]] | None:
    """The class and its options for transformers' `Trainer(optimizer_cls_and_kwargs=...)`, which adds the groups with
    their weight decay; None where the recipe asks for nothing that torch's own does not do.

    Betas and epsilon are the defaults, which are transformers' too.
    """
    wanted = recipe.optimizer
    if wanted.optimizer_state_dtype == "auto" and not wanted.gradient_release:
        return None
    options = {"state_dtype": _DTYPES[wanted.optimizer_state_dtype], "gradient_release": wanted.gradient_release}
    return AdamW, {"lr": wanted.learning_rate, **options}
