#!/usr/bin/env bash
# peft 0.21.2: `trainable_token_indices` of two tokens makes tensors of the size of the whole embedding in every forward
# and backward pass.
#
# The option is there to train a few rows of an embedding instead of all of it, and what it stores and updates is indeed
# two rows. In a step, though, the rows are put into a copy of the whole embedding (once more for a tied head), and the
# gradient that comes back is one of the whole embedding too, from which two rows are taken. Of a vocabulary of 128,256
# and 2,048 columns in bf16 each such tensor is 525 MB: on a small card two rows cost gigabytes, where training nothing
# but LoRA adapters makes no such tensor.
#
# Seen (2026-12-01, Python 3.11), tensors of the embedding's shape that one step of a Llama makes (forward, backward):
#   untied ends, LoRA alone:          0, 0
#   untied ends, LoRA and two tokens: 1, 1
#   tied ends, LoRA alone:            0, 0
#   tied ends, LoRA and two tokens:   2, 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.23.0 peft==0.21.2
cat > "$folder/rows.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

ROWS, COLUMNS = 997, 64


class Whole(TorchDispatchMode):
    """Counts operators that make a new tensor of the embedding's shape."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.shape == (ROWS, COLUMNS) and out.untyped_storage().data_ptr() not in views:
            self.made += 1
        return out


def counted(tied: bool, tokens: list[int] | None) -> tuple[int, int]:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=ROWS, hidden_size=COLUMNS, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=tied,
    ))
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens))
    ids = torch.arange(16)[None]
    with Whole() as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with Whole() as backward:
        loss.backward()
    return forward.made, backward.made


expected = {(False, False): (0, 0), (False, True): (1, 1), (True, False): (0, 0), (True, True): (2, 2)}
for tied in (False, True):
    for tokens in (None, [1, 2]):
        found = counted(tied, tokens)
        name = f"{'tied' if tied else 'untied'} ends, LoRA {'and two tokens' if tokens else 'alone'}:"
        print(f"{name:33} {found[0]}, {found[1]}")
        assert found == expected[tied, tokens is not None], found
PY
"$folder/venv/bin/python" -W ignore "$folder/rows.py" 2>/dev/null
echo "as described"
