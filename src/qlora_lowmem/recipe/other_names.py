"""What other tools call what a recipe says: TRL, transformers, PEFT, bitsandbytes, axolotl, LLaMA-Factory."""

from collections.abc import Mapping

# The same knob under another name.
_NAMES = {
    "model": ("model_id", "model_name", "model_name_or_path", "base_model"),
    "revision": ("model_revision", "revision_of_model"),
    "attention": (
        *("attn_implementation", "flash_attn", "flash_attention", "sdp_attention", "eager_attention"),
        "xformers_attention",
    ),
    "load_in_4bit": ("quantization_bit", "load_in_8bit"),
    "quant_type": ("bnb_4bit_quant_type", "quantization_type"),
    "double_quant": ("bnb_4bit_use_double_quant", "double_quantization"),
    "compute_dtype": ("bnb_4bit_compute_dtype", "bf16", "fp16", "pure_bf16", "torch_dtype", "dtype"),
    "quant_storage": ("bnb_4bit_quant_storage",),
    "lora_r": ("r", "rank", "lora_rank", "peft_lora_r"),
    "lora_alpha": ("alpha", "peft_lora_alpha"),
    "lora_dropout": ("dropout",),
    "use_rslora": ("peft_use_rslora",),
    "target_modules": ("lora_target_modules", "lora_target"),
    "modules_to_save": ("lora_modules_to_save", "additional_target"),
    "trainable_token_indices": ("peft_trainable_token_indices", "trainable_tokens"),
    "added_tokens": ("tokens", "add_tokens", "new_tokens", "add_special_tokens", "new_special_tokens"),
    "max_seq_length": ("max_length", "seq_length", "sequence_len", "cutoff_len"),
    "batch_size": ("per_device_train_batch_size", "micro_batch_size"),
    "packing": ("sample_packing", "neat_packing"),
    "activation_offloading": ("offload_activations",),
    "optimizer": ("optim",),
    "learning_rate": ("lr",),
    "lr_scheduler": ("lr_scheduler_type",),
    "num_epochs": ("num_train_epochs", "epochs"),
    "max_steps": ("steps",),
    "dataloader_workers": ("dataloader_num_workers",),
    "pin_memory": ("dataloader_pin_memory",),
    "data": ("dataset", "train_file", "dataset_name"),
    "eval_data": ("eval_dataset", "test_datasets", "validation_file"),
    "neftune_noise_alpha": ("noisy_embedding_alpha",),
    "output_dir": ("output",),
    "eval_fraction": ("test_size", "validation_split", "val_size", "val_set_size"),
    "resume": ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
}
OURS: Mapping[str, str] = {other: leaf for leaf, others in _NAMES.items() for other in others}

# What is said in another way here: what to write, or that there is nothing to write.
_ALWAYS = "remove it: a recipe is always supervised fine-tuning of LoRA adapters"
_NOT_OFFERED = "remove it: it is not offered here"
_OWN = "remove it: nothing here needs it said"
INSTEAD: Mapping[str, str] = {
    "adapter": f"{_ALWAYS}; quantization.load_in_4bit: true makes it QLoRA",
    "finetuning_type": f"{_ALWAYS}; quantization.load_in_4bit: true makes it QLoRA",
    **dict.fromkeys(("stage", "do_train", "rl"), _ALWAYS),
    **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config"), "remove it: the model's files say it"),
    "lora_target_linear": "write lora.target_modules: all-linear",
    "layers_to_transform": r"write lora.exclude_modules, an expression such as '.*\.layers\.[0-7]\..*'",
    "peft_layers_to_transform": r"write lora.exclude_modules, an expression such as '.*\.layers\.[0-7]\..*'",
    "datasets": "write data.data: one file or data set (qlora-lowmem data convert writes what it reads)",
    "dataset_dir": "write data.data: the path of one file, relative to the recipe",
    "train_on_inputs": "write data.train_on: all, or completions where it was false",
    "train_on_prompt": "write data.train_on: all, or completions where it was false",
    "assistant_only_loss": "write data.train_on: completions, or all where it was false",
    "completion_only_loss": "write data.train_on: completions, or all where it was false",
    "chat_template": "remove it: conversations are put by the model's own chat template",
    "special_tokens": "write data.added_tokens for new ones; which token ends or pads, the model's tokenizer says",
    "added_tokens_overrides": "write data.added_tokens: they take the rows that an embedding has to spare",
    "resize_vocab": "remove it: the embedding grows where data.added_tokens need it",
    "ensure_weight_tying": "remove it: tied weights stay tied, trained or not",
    "peft_ensure_weight_tying": "remove it: tied weights stay tied, trained or not",
    "max_samples": "write schedule.max_steps: that many steps of samples are seen",
    "disable_gradient_checkpointing": "write memory.gradient_checkpointing: false",
    "gradient_checkpointing_kwargs": _OWN,
    "evals_per_epoch": "write schedule.eval_steps, in optimizer steps",
    "saves_per_epoch": "write schedule.save_steps, in optimizer steps",
    "eval_strategy": "write schedule.eval_steps, in optimizer steps",
    "save_strategy": "write schedule.save_steps, in optimizer steps",
    "eval_batch_size": "remove it: evaluation takes batch.batch_size samples at a time",
    "per_device_eval_batch_size": "remove it: evaluation takes batch.batch_size samples at a time",
    "overwrite_output_dir": "remove it: a run goes on in its own folder, or takes another run.output_dir",
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_name"), "write run.report_to: wandb, which reads WANDB_*"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config"), "remove it: accelerate launch --config_file says how to share"
    ),
    **dict.fromkeys(
        ("use_unsloth", "enable_liger_kernel", "cut_cross_entropy"), "remove it: lean.lean: true saves memory here"
    ),
    **dict.fromkeys(("use_dora", "peft_use_dora", "pissa_init", "loraplus_lr_ratio", "use_galore"), _NOT_OFFERED),
    **dict.fromkeys(("pad_to_sequence_len", "group_by_length", "lora_fan_in_fan_out", "strict", "tf32"), _OWN),
    **dict.fromkeys(("overwrite_cache", "dataset_prepared_path", "preprocessing_num_workers", "plot_loss"), _OWN),
    **dict.fromkeys(("save_only_model", "ddp_timeout", "local_rank", "debug", "quantization_method"), _OWN),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "remove it: a run goes on in its own run.output_dir"),
}
