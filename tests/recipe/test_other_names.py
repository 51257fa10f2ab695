"""A recipe of another tool is answered key by key with what it is called here."""

import re
from pathlib import Path

import pytest

from qlora_lowmem.commands.frame import CommandParser
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe
from qlora_lowmem.recipe.other_names import INSTEAD, OURS

# As in examples/llama-3/qlora.yml of axolotl.
AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: aaditya/alpaca_subset_1
    type: alpaca
dataset_prepared_path:
val_set_size: 0.02
output_dir: ./outputs/out/qlora-llama3_1-8b
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
  - q_proj
lora_target_linear: true
peft_use_rslora: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp_config: {fsdp_offload_params: true}
special_tokens:
  pad_token: "<|end_of_text|>"
"""
# As in examples/train_qlora/llama3_lora_sft_bnb_npu.yaml of LLaMA-Factory.
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
quantization_bit: 4
quantization_method: bnb
double_quantization: false
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/llama3-8b/lora/sft
overwrite_output_dir: true
plot_loss: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
eval_dataset: alpaca_en_demo
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
neftune_noise_alpha: 5
disable_gradient_checkpointing: true
"""
# What either calls tokens that are added, and what is trained of the base.
TOKENS = """
lora_modules_to_save: [embed_tokens, lm_head]
tokens: ["<|im_start|>"]
added_tokens_overrides: {128041: "<|im_end|>"}
additional_target: embed_tokens,lm_head
new_special_tokens: <|im_start|>
resize_vocab: true
"""


@pytest.mark.parametrize("content", [AXOLOTL, LLAMA_FACTORY, TOKENS], ids=["axolotl", "LLaMA-Factory", "tokens"])
def test_every_key_of_a_foreign_recipe_gets_an_answer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    said = {re.split(r"[:=]? ", line.strip(), maxsplit=3)[2]: line for line in str(caught.value).splitlines()[1:]}
    keys = re.findall(r"^(\w+):", content, re.MULTILINE)
    assert list(said) == keys
    for line in said.values():
        assert re.search(r"did you mean \w+\.\w+\?|stands in the section|; write |remove it: ", line), line
    for key, ours in {
        "base_model": "base.model", "sequence_len": "batch.max_seq_length", "micro_batch_size": "batch.batch_size",
        "val_set_size": "data.eval_fraction", "datasets": "data.data", "lora_target_linear": "all-linear",
        "lora_target_modules": "lora.target_modules", "peft_use_rslora": "lora.use_rslora", "adapter": "load_in_4bit",
        "quantization_bit": "load_in_4bit", "cutoff_len": "batch.max_seq_length", "eval_dataset": "data.eval_data",
        "lora_modules_to_save": "lora.modules_to_save", "additional_target": "lora.modules_to_save",
        "tokens": "data.added_tokens", "new_special_tokens": "data.added_tokens",
        "added_tokens_overrides": "data.added_tokens",
        "warmup_ratio": "the section optimizer", "neftune_noise_alpha": "the section data",
    }.items():  # fmt: skip
        assert ours in said.get(key, ours), key


def test_what_it_is_called_here_is_there() -> None:
    specs = field_specs()
    assert set(OURS.values()) <= specs.keys()
    assert not (OURS.keys() | INSTEAD.keys()) & specs.keys()
    assert not OURS.keys() & INSTEAD.keys()
    for words in INSTEAD.values():
        for section, leaf in re.findall(r"\b([a-z]+)\.([a-z_0-9]+)\b(?!\.)", words.replace(".layers", "")):
            assert specs[leaf].section == section, words


@pytest.mark.parametrize(
    ("flag", "ours"), [("--num_train_epochs", "--num-epochs"), ("--cutoff_len", "--max-seq-length")]
)
def test_a_flag_of_another_tool_too(flag: str, ours: str) -> None:
    parser = CommandParser("train")
    add_override_arguments(parser)
    with pytest.raises(UsageError, match=f"unrecognized arguments: {flag}.*did you mean {ours}"):
        parser.parse_args([flag, "3"])
