"""Fields that are each allowed but cannot hold together: what an argument with the recipe's author would settle."""

from collections.abc import Iterator

from qlora_lowmem.recipe import SYNTHETIC, Recipe

# (whether it is so, the fields that disagree, why and what to change)
Row = tuple[object, tuple[str, ...], str]


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """The fields of `recipe`, whose single values are all allowed, that cannot hold together; why, and what to change.

    A combination that only does nothing (pinned memory on a CPU, say) is not one. One that would break a promise is:
    a cap that caps nothing, a warm-up that never ends (where `max_steps` says how long the run is).
    """
    base, memory, lean, optimizer = recipe.base, recipe.memory, recipe.lean, recipe.optimizer
    name, released, warmup = optimizer.optimizer, optimizer.gradient_release, optimizer.warmup_steps
    share, held_out, own = optimizer.warmup_ratio, recipe.data.eval_fraction, recipe.data.eval_data
    steps, half = recipe.schedule.max_steps, recipe.quantization.compute_dtype == "fp16"
    too_long = warm_up_beyond(warmup, steps) if steps is not None else None
    gguf = base.model.lower().endswith(".gguf")
    of_the_base: dict[str, object] = {
        "modules_to_save": recipe.lora.modules_to_save,
        "trainable_token_indices": recipe.lora.trainable_token_indices,
        "added_tokens": recipe.data.added_tokens,
    }
    rows: list[Row] = [
        (half and recipe.lora.adapter_dtype == "bf16", ("compute_dtype", "adapter_dtype"),
         "fp16 arithmetic needs loss scaling, which cannot unscale bf16 gradients; set adapter_dtype to fp32"),
        (optimizer.optimizer_state_dtype != "auto" and name != "adamw_torch", ("optimizer_state_dtype", "optimizer"),
         f"{name} keeps its state in a dtype of its own; set optimizer to adamw_torch, or optimizer_state_dtype to "
         "auto"),
        (released and name != "adamw_torch", ("gradient_release", "optimizer"),
         f"{name} steps all weights at once, after backward; set optimizer to adamw_torch, or gradient_release to "
         "false"),
        (released and recipe.batch.gradient_accumulation_steps > 1, ("gradient_release", "gradient_accumulation_steps"),
         "gradients that are summed over micro-batches must stay until the last; set gradient_accumulation_steps to "
         "1, or gradient_release to false"),
        (released and optimizer.max_grad_norm, ("gradient_release", "max_grad_norm"),
         "the norm of all gradients is known only once all are there; set max_grad_norm to 0, or gradient_release "
         "to false"),
        (released and half, ("gradient_release", "compute_dtype"),
         "fp16 arithmetic needs loss scaling, which looks at all gradients before a step; set compute_dtype to bf16 "
         "or fp32, or gradient_release to false"),
        (too_long is not None, ("warmup_steps", "max_steps"), f"{too_long}, or raise max_steps"),
        (warmup and share, ("warmup_steps", "warmup_ratio"),
         "both say how long the warm-up is; set warmup_ratio to 0, or warmup_steps to 0"),
        (share and optimizer.lr_scheduler == "constant", ("lr_scheduler", "warmup_ratio"),
         "a constant learning rate has no warm-up; set lr_scheduler to constant_with_warmup, or warmup_ratio to 0"),
        (warmup and optimizer.lr_scheduler == "constant", ("lr_scheduler", "warmup_steps"),
         "a constant learning rate has no warm-up; set lr_scheduler to constant_with_warmup, or warmup_steps to 0"),
        (recipe.schedule.eval_steps is not None and not held_out and own is None, ("eval_steps", "eval_fraction"),
         "there is nothing to evaluate on; set eval_fraction above 0 (0.05 holds out one sample in twenty), eval_data "
         "to a file, or eval_steps to null"),
        (own == SYNTHETIC, ("eval_data", "data"), "synthetic samples show nothing that was learned; name a file"),
        (held_out and own is not None, ("eval_fraction", "eval_data"),
         "both say what is evaluated on; set eval_fraction to 0, or eval_data to null"),
        (base.revision is not None and (gguf or base.model.startswith((".", "/", "~"))), ("revision", "model"),
         "a revision belongs to a model on the hub, and this model is on disk; remove revision, or name a hub id"),
        (base.weights == "random" and gguf, ("weights", "model"),
         "a GGUF file is its weights; set weights to pretrained, or name a folder with config.json"),
        (not lean.lean and lean.quantised_embeddings != "none", ("quantised_embeddings", "lean"),
         "quantised embeddings are one of the lean implementations; set lean to true, or quantised_embeddings to none"),
        *((lean.quantised_embeddings != "none" and value is not None, ("quantised_embeddings", leaf),
           f"a table in a few bits is not trained; set quantised_embeddings to none, or {leaf} to null")
          for leaf, value in of_the_base.items()),
        (lean.lean and not memory.gradient_checkpointing, ("lean", "gradient_checkpointing"),
         "lean layers keep their inputs only, which is checkpointing; set gradient_checkpointing to true"),
        (lean.lean and memory.loss == "full", ("lean", "loss"),
         "lean never holds the full logits; set loss to fused, or lean to false"),
        (lean.lean and memory.activation_offloading, ("lean", "activation_offloading"),
         "lean decides itself what is kept and where; set checkpoints to host, and activation_offloading to false"),
    ]  # fmt: skip
    limit = memory.max_memory
    whole = isinstance(limit, str) and limit.strip().removesuffix("%").strip() in ("100", "100.0")
    plain = "adamw_8bit" if name.endswith("8bit") else "adamw_torch"
    on_cpu: list[Row] = [
        (not whole, ("max_memory", "device"),
         'the cap is one of GPU memory, and a cpu run uses none; set max_memory to "100%", or device to cuda'),
        (memory.activation_offloading, ("activation_offloading", "device"),
         "activations of a cpu run are in host memory already; set activation_offloading to false"),
        (name.startswith("paged_"), ("optimizer", "device"),
         f"paged optimizers page between the GPU and the host, and a cpu run has no GPU; set optimizer to {plain}"),
        (half, ("compute_dtype", "device"),
         "fp16 with loss scaling is for GPUs; on a cpu set compute_dtype to auto, bf16 or fp32"),
    ]  # fmt: skip
    for applies, leaves, message in rows + (on_cpu if recipe.run.device == "cpu" else []):
        if applies:
            yield leaves, message


def warm_up_beyond(warmup: int, steps: int) -> str | None:
    """Why a warm-up does not go with a run of so many steps, and what to do; None where it does.

    Without `max_steps`, their number is known only once the samples are counted: the run asks again then.
    """
    if warmup <= steps:
        return None
    return (
        f"the warm-up of {warmup} steps is longer than the run of {steps}, so the learning rate is never reached; "
        f"set warmup_steps to {steps} or less"
    )
