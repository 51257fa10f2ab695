"""An adapter added into its base model's 16-bit weights, a few rows at a time: W + scale * B A, computed in fp32.

On the device lies a tile of one matrix; in host memory, one shard of the result. The base model itself is never
loaded: its safetensors files are read tensor by tensor. Weights that bitsandbytes has in 4 bits there are dequantised,
one matrix at a time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.adapter_files import ADAPTER_ADVICE, check_adapter_files
from qlora_lowmem.models.stored import BASE_ADVICE, Stored, names_in_files, stored_tensors
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS, reading
from qlora_lowmem.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TILE_BYTES = 32 * 2**20  # of fp32 rows; with their 16-bit source and result, 64 MiB on the device
_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by the name of the weight that they adapt: A is (r, in_features), B is (out_features, r)."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    @classmethod
    def read(cls, folder: Path, recipe: Recipe) -> "Adapter":
        """The adapter in the output folder of a run of `recipe` or in one of its checkpoints.

        Raises:
            UsageError: as `check_adapter_files`, or its tensors cannot be read.
        """
        modules = check_adapter_files(folder, recipe)
        weights_file, lora = folder / ADAPTER_WEIGHTS, recipe.lora
        # peft/tuners/lora/layer.py, `LoraLayer.update_layer`; rsLoRA: Kalajdzievski 2023, section 3.
        scale = lora.lora_alpha / (math.sqrt(lora.lora_r) if lora.use_rslora else lora.lora_r)
        with reading(weights_file, ADAPTER_ADVICE), safe_open(weights_file, framework="pt") as file:
            pairs = {
                f"{module}.weight": (file.get_tensor(a).float(), file.get_tensor(b).float())
                for module, (a, b) in modules.items()
            }
        return cls(pairs, scale)

    def of(self, model: torch.nn.Module) -> "Adapter":
        """For the weights as `model` (on any device) stores them: GPT-2's Conv1D is (in_features, out_features)."""
        turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        pairs = {name: (b.T, a.T) if name in turned else (a, b) for name, (a, b) in self.pairs.items()}
        return replace(self, pairs=pairs)

    def in_names_of(self, base: Path, model: PreTrainedModel) -> "Adapter":
        """The same by the names that the weights have in the base's files, as transformers converts them on loading.

        A weight that it makes of several keeps its own name, which no file has.

        Args:
            model: the base model on the meta device.
        """
        in_files = names_in_files(model, stored_tensors(base))
        return replace(self, pairs={in_files.get(name, name): pair for name, pair in self.pairs.items()})


def merged_bytes(base: Path) -> int:
    """Bytes of the merged weights on disk, headers left out."""
    return sum(source.bytes for source in stored_tensors(base).values())


def merge(
    base: Path, adapter: Adapter, to: Path, dtype: torch.dtype, device: torch.device, *, quiet: bool = False
) -> None:
    """Write the base model's weights with the adapter in them to `to`, as safetensors with an index.

    Every floating-point tensor is written in `dtype`.

    Raises:
        UsageError: adapted weights that the base's files do not have by that name and shape; a file of the base that
            cannot be read.
        OSError, SafetensorError: something cannot be written.
    """
    sources = stored_tensors(base)
    _check_fit(adapter, sources, base)
    shards = _shards(sources)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    with tqdm(total=len(sources), desc="merging", unit="tensor", disable=quiet) as bar:
        for file, shard in zip(names, shards, strict=True):
            tensors = {}
            for name in shard:
                tensors[name] = _merged(name, sources[name], adapter, dtype, device)
                bar.update(1)
            save_file(tensors, to / file, metadata={"format": "pt"})
    total = sum(source.bytes for source in sources.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (to / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _merged(name: str, source: Stored, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor of the result, in host memory."""
    with reading(source.file, BASE_ADVICE), safe_open(source.file, framework="pt") as file:
        if name not in adapter.pairs:
            tensor: Tensor = _dequantised(name, source, file, device) if source.state else file.get_tensor(name)
            return tensor.to(device="cpu", dtype=dtype) if source.is_float else tensor
        rows: Any = _dequantised(name, source, file, device) if source.state else file.get_slice(name)
        a, b = (half.to(device) for half in adapter.pairs[name])
        result = torch.empty(source.shape, dtype=dtype)
        rows_a_tile = max(1, _TILE_BYTES // (4 * source.shape[1]))
        for first in range(0, source.shape[0], rows_a_tile):
            last = min(first + rows_a_tile, source.shape[0])
            tile = rows[first:last].to(device).float()
            tile.addmm_(b[first:last], a, alpha=adapter.scale)
            result[first:last] = tile.to(dtype)
    return result


def _dequantised(name: str, source: Stored, file: Any, device: torch.device) -> Tensor:
    """A weight from its 4 bits: its numbers' scales and their table stand beside it (bitsandbytes/functional.py)."""
    state = {end: file.get_tensor(f"{name}.{end}") for end in source.state}
    weight: Tensor = dequantize_4bit(file.get_tensor(name).to(device), QuantState.from_dict(state, device))
    return weight


def _shards(sources: Mapping[str, Stored]) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, source in sources.items():
        if not shards or source.bytes > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= source.bytes
    return shards


def _check_fit(adapter: Adapter, sources: Mapping[str, Stored], base: Path) -> None:
    for name, (a, b) in adapter.pairs.items():
        if name not in sources:
            raise UsageError(
                f"the adapter adapts {name}, which the weights in {str(base)!r} do not have, or transformers makes of "
                "several on loading. PEFT's merge_and_unload on the loaded model does it, in as much memory as the "
                "model takes"
            )
        if sources[name].shape != (b.shape[0], a.shape[1]):
            raise UsageError(
                f"the adapter's {name} is {(b.shape[0], a.shape[1])}, and the base's {sources[name].shape}: this is "
                "an adapter of another model"
            )
