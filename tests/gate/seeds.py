"""Changes seeded into a training job on a virtual card: some cost memory, some must not cost a byte.

Each is a patch of code, so that the recipe and its hash stay what they were. `run` is called in a worker.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Patch = Callable[[], None]
TRAINED = ("optimizer", "adapters", "gradients")

# Four layers of a Granite hybrid, large enough that no change hides in the rounding of blocks.
MODEL: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "shared_intermediate_size": 512,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Seed:
    """A change that costs memory.

    Attributes:
        patch: makes it.
        kinds: the kind that grows most must be one of these.
        base: the job that it is seeded into: `checkpointed` or `kept` (no checkpointing, full logits).
    """

    patch: Patch
    kinds: tuple[str, ...]
    base: str = "checkpointed"


def run(content: dict[str, Any], seed: str) -> dict[str, Any]:
    """In the worker: the recipe with the seeded change."""
    if seed:
        (REGRESSIONS[seed].patch if seed in REGRESSIONS else HARMLESS[seed])()
    from qlora_lowmem.plan.worker import run_here

    return run_here(content, attribute=True)


def _wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace `owner.name` by `change(original, *args, **kwargs)`."""
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    setattr(owner, name, changed)


def _with_model(change: Callable[[Any], None]) -> Patch:
    """Change the base model once it is loaded."""

    def patch() -> None:
        import qlora_lowmem.run.job as job

        def loaded(original: Any, *args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            change(model)
            return model

        _wrap(job, "load_base", loaded)

    return patch


def _with_job(change: Callable[[Any], None]) -> Patch:
    """Change the job once it is built."""

    def patch() -> None:
        import qlora_lowmem.run.execute as execute

        def built(original: Any, *args: Any, **kwargs: Any) -> Any:
            job = original(*args, **kwargs)
            change(job)
            return job

        _wrap(execute, "build_job", built)

    return patch


def _with_lora(**change: Any) -> Patch:
    def patch() -> None:
        import qlora_lowmem.models.adapters as adapters

        def config(original: Any, **kwargs: Any) -> Any:
            return original(**{k: change[k](v) if k in change else v for k, v in kwargs.items()})

        _wrap(adapters, "LoraConfig", config)

    return patch


def _with_arguments(**change: Any) -> Patch:
    def patch() -> None:
        import qlora_lowmem.run.job as job

        _wrap(job, "SFTConfig", lambda original, **kwargs: original(**(kwargs | change)))

    return patch


def _fp32_embeddings(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    embeddings.weight.data = embeddings.weight.data.float()
    embeddings.register_forward_hook(lambda _module, _args, output: output.to(model.dtype))


def _full_logits() -> None:
    import qlora_lowmem.run.job as job

    original = job.LowMemTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **(kwargs | {"full_logits": True}))

    job.LowMemTrainer.__init__ = init  # type: ignore[method-assign]


def _one_layer_without_checkpointing(job: Any) -> None:
    layer = job.model.get_base_model().model.layers[0]

    def switch_off(_module: Any, _args: Any) -> None:
        layer.gradient_checkpointing = False

    job.model.register_forward_pre_hook(switch_off)


_kept: list[Any] = []


def _leak(job: Any) -> None:
    kept: list[Any] = []
    job.model.get_base_model().model.norm.register_forward_hook(lambda _m, _a, output: kept.append(output))


def _fp32_optimizer_state() -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    def cast(optimizer: Any, dtype: Any) -> None:
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(dtype or parameter.dtype)

    register_optimizer_step_pre_hook(lambda optimizer, _a, _k: cast(optimizer, None))
    register_optimizer_step_post_hook(lambda optimizer, _a, _k: cast(optimizer, torch.float32))


def _residual_copies(model: Any) -> None:
    for layer in model.model.layers:
        layer.register_forward_pre_hook(_keep_a_copy, with_kwargs=True)


def _keep_a_copy(layer: Any, args: Any, kwargs: Any) -> None:
    layer.residual_copy = (args[0] if args else kwargs["hidden_states"]).detach().clone()


def _use_cache() -> None:
    """As a generation's forward in training: a cache is made, and is kept until the next micro-batch replaces it.

    Alone, `use_cache=True` costs nothing here: keys and values are what backward keeps anyway.
    """
    from transformers import Trainer

    original = Trainer.compute_loss

    def compute(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        model.register_forward_hook(lambda _m, _a, output: setattr(self, "cache", output.past_key_values))
        return original(self, model, {**inputs, "use_cache": True}, *args, **kwargs)

    Trainer.compute_loss = compute  # type: ignore[method-assign]


def _masked_attention() -> None:
    import torch

    def attention(original: Any, query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        length = query.shape[2]
        mask = torch.ones(query.shape[0], 1, length, length, dtype=torch.bool, device=query.device)
        return original(query, key, value, **{**kwargs, "attn_mask": mask, "is_causal": False})

    _wrap(torch.nn.functional, "scaled_dot_product_attention", attention)


def _eager_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def _larger_scan_chunk(model: Any) -> None:
    for layer in model.model.layers:
        if layer.mamba is not None:
            layer.mamba.chunk_size *= 4


def _one_layer_unquantised() -> None:
    import torch
    from torch import nn

    import qlora_lowmem.run.job as job

    def loaded(original: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        mlp = model.model.layers[0].shared_mlp
        old = mlp.input_linear
        mlp.input_linear = nn.Linear(
            old.in_features, old.out_features, bias=False, dtype=torch.bfloat16, device="cuda"
        ).requires_grad_(False)
        return model

    _wrap(job, "load_base", loaded)


REGRESSIONS: dict[str, Seed] = {
    "fp32 embeddings": Seed(_with_model(_fp32_embeddings), ("weights_other",)),
    "logits kept in fp32": Seed(_full_logits, ("loss",)),
    "checkpointing off in one layer": Seed(_with_job(_one_layer_without_checkpointing), ("activations_mamba",)),
    "a leaked reference per step": Seed(_with_job(_leak), ("unexplained", "activations_norm")),
    "adapters on more modules": Seed(_with_lora(target_modules=lambda names: [*names, "input_linear"]), TRAINED),
    "rank doubled": Seed(_with_lora(r=lambda r: 2 * r), TRAINED),
    "optimizer state in fp32": Seed(_fp32_optimizer_state, ("optimizer",)),
    "an extra residual copy": Seed(
        _with_model(_residual_copies), ("activations_other", "recomputed_other", "checkpoints")
    ),
    "use_cache": Seed(_use_cache, ("activations_mamba", "activations_attention", "unexplained"), "kept"),
    "a mask that disables flash attention": Seed(_masked_attention, ("activations_attention",), "kept"),
    "eager attention": Seed(_with_model(_eager_attention), ("activations_attention",), "kept"),
    "a larger scan chunk": Seed(_with_model(_larger_scan_chunk), ("activations_mamba",), "kept"),
    "a layer not quantised": Seed(_one_layer_unquantised, ("weights_other",)),
}


def _renamed_class(model: Any) -> None:
    for layer in model.model.layers:
        layer.__class__ = type("RenamedDecoderLayer", (type(layer),), {})


def _transparent_wrapper(model: Any) -> None:
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward, **kwargs: _forward(*args, **kwargs)


def _read_the_loss() -> None:
    import qlora_lowmem.run.job as job

    original = job.LowMemTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        loss.item()
        return loss

    job.LowMemTrainer.training_step = step  # type: ignore[method-assign]


def _another_callback(job: Any) -> None:
    from transformers import TrainerCallback

    job.trainer.add_callback(TrainerCallback())


def _host_tensors() -> None:
    import torch

    _kept.append(torch.ones(2**20))


def _passing_tensor(model: Any) -> None:
    import torch

    torch.empty(2**16, device=model.device)


def _in_place_view(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda _m, _a, output: output.view(output.shape))


def _other_environment() -> None:
    os.environ["QLORA_LOWMEM_UNRELATED"] = json.dumps({"a": 1})


HARMLESS: dict[str, Patch] = {
    "nothing": lambda: None,
    "a class renamed": _with_model(_renamed_class),
    "forward wrapped": _with_model(_transparent_wrapper),
    "targets in another order": _with_lora(target_modules=lambda names: list(reversed(names))),
    "lora_alpha": _with_lora(lora_alpha=lambda alpha: 4 * alpha),
    "learning rate": _with_arguments(learning_rate=1e-3),
    "weight decay": _with_arguments(weight_decay=0.1),
    "scheduler": _with_arguments(lr_scheduler_type="constant"),
    "logging every step": _with_arguments(logging_steps=1),
    "seed": _with_arguments(seed=7),
    "the loss read each step": _read_the_loss,
    "another callback": _with_job(_another_callback),
    "tensors in host memory": _host_tensors,
    "a tensor let go before training": _with_model(_passing_tensor),
    "a view that nobody keeps": _with_model(_in_place_view),
    "an environment variable": _other_environment,
}
