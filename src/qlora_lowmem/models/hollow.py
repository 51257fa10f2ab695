"""A checkpoint of a known architecture at full size, all of its weights zero: what loading and merging can be run on.

Its one safetensors file is a header and a hole, so it takes no disk and no time. Shapes, names and dtype are those of
the pretrained checkpoint, and so is every byte of memory that reading it takes.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from qlora_lowmem.models.loading import stand_in_tokenizer
from qlora_lowmem.models.random_weights import meta_model

_BF16_BYTES = 2


def write_hollow_checkpoint(architecture: dict[str, Any], folder: Path) -> None:
    """Make `folder` with config, tokenizer and bf16 weights of `architecture` (the content of a `config.json`).

    The file's format: https://huggingface.co/docs/safetensors (eight bytes of length, JSON, data).
    """
    folder.mkdir(parents=True)
    model = meta_model(architecture, torch.bfloat16, "sdpa")
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            size = _BF16_BYTES * math.prod(tensor.shape)
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n", encoding="utf-8")
    stand_in_tokenizer().save_pretrained(folder)
