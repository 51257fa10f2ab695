"""In the worker: transformers' own loading of a full-size checkpoint on the card at hand, and what it puts where.

The checkpoint is a safetensors file with a true header and a body that was never written: the file system keeps no
block of it and reads zeros, and on a virtual GPU no value is looked at.
"""

import json
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lowmem.models.random_weights import config_from, meta_model
from qlora_lowmem.models.sources import architecture


def write_zero_checkpoint(folder: Path, name: str) -> int:
    """`config.json` and `model.safetensors` of a known architecture in bf16; the bytes of its weights."""
    content = architecture(name)
    model = meta_model(config_from(content), torch.bfloat16, "sdpa")
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in model.state_dict().items():
        if key not in tied:
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return end


def load(
    name: str, device_map: Any, max_memory: dict[str, Any] | None = None, four_bit: bool = True, then_bytes: int = 0
) -> dict[str, Any]:
    """`from_pretrained` with these arguments, and one more tensor of `then_bytes`.

    Returns:
        `error` (None if it loaded), `places` (tensors of the model by device; `meta` is on the host or disk),
        `placement` (modules by device, as accelerate decided; empty where all are on one device), `loaded`, `peak`
        and `after` (bytes allocated after loading, at the peak of loading, after the tensor).
    """
    limits = {int(key) if key.isdigit() else key: value for key, value in max_memory.items()} if max_memory else None
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if four_bit
        else None
    )
    result: dict[str, Any] = {"error": None, "places": {}, "placement": {}, "loaded": 0, "peak": 0, "after": 0}
    with tempfile.TemporaryDirectory() as folder:
        write_zero_checkpoint(Path(folder), name)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map=device_map,
                max_memory=limits,
                quantization_config=quantization,
                dtype=torch.bfloat16,
                use_safetensors=True,
            )
        except (ValueError, torch.OutOfMemoryError) as error:
            return result | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        placement = getattr(model, "hf_device_map", None) or {}
        result["places"] = Counter(parameter.device.type for parameter in model.parameters())
        result["placement"] = Counter(str(device) for device in placement.values())
        result["loaded"], result["peak"] = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if then_bytes:
            more = torch.empty(then_bytes, dtype=torch.uint8, device="cuda")
            result["after"] = torch.cuda.memory_allocated()
            del more
    return result


def bytes_taken(limit: Any) -> dict[str, Any]:
    """What accelerate takes a limit of device 0 for: `bytes`, or the `error`."""
    try:
        return {"bytes": int(get_max_memory({0: limit})[0]), "error": None}
    except ValueError as error:
        return {"bytes": 0, "error": f"ValueError: {' '.join(str(error).split())[:160]}"}
