"""An adapter added into its base model's 16-bit weights, a few rows at a time: W + scale * B A, computed in fp32.
What of the base was trained itself, whole or some rows of it, takes the place of what is there.

On the device lies a tile of one matrix; in host memory, one shard of the result. The base model itself is never
loaded: its safetensors files are read tensor by tensor. Weights that bitsandbytes has in 4 bits there are dequantised,
one matrix at a time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

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
_Change = TypeVar("_Change")


@dataclass(frozen=True)
class Adapter:
    """What was trained, by the name of the weight of the base that it changes.

    Attributes:
        pairs: LoRA's A (r, in_features) and B (out_features, r).
        scale: multiplies B A.
        whole: weights that were trained whole.
        rows: tokens, and their rows (tokens, hidden).
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, recipe: Recipe) -> "Adapter":
        """The adapter in the output folder of a run of `recipe` or in one of its checkpoints.

        Raises:
            UsageError: as `check_adapter_files`, or its tensors cannot be read.
        """
        found = check_adapter_files(folder, recipe)
        weights_file, lora = folder / ADAPTER_WEIGHTS, recipe.lora
        # peft/tuners/lora/layer.py, `LoraLayer.update_layer`; rsLoRA: Kalajdzievski 2023, section 3.
        scale = lora.lora_alpha / (math.sqrt(lora.lora_r) if lora.use_rslora else lora.lora_r)
        with reading(weights_file, ADAPTER_ADVICE), safe_open(weights_file, framework="pt") as file:
            pairs = {
                f"{module}.weight": (file.get_tensor(a).float(), file.get_tensor(b).float())
                for module, (a, b) in found.modules.items()
            }
            whole = {name: file.get_tensor(key) for name, key in found.whole.items()}
            rows = {f"{name}.weight": (tokens, file.get_tensor(key)) for name, (key, tokens) in found.rows.items()}
        return cls(pairs, scale, whole, rows)

    def of(self, model: torch.nn.Module) -> "Adapter":
        """For the weights as `model` (on any device) stores them: GPT-2's Conv1D is (in_features, out_features)."""
        turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        pairs = {name: (b.T, a.T) if name in turned else (a, b) for name, (a, b) in self.pairs.items()}
        return replace(self, pairs=pairs)

    def in_names_of(self, base: Path, model: PreTrainedModel) -> "Adapter":
        """The same by the names that the weights have in the base's files, as transformers converts them on loading.

        A weight that it makes of several keeps its own name, which no file has. A tied weight that was trained itself
        is changed under each of its names that the files have.

        Args:
            model: the base model on the meta device.
        """
        in_files = names_in_files(model, stored_tensors(base))
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        names = {name: same for same in tied.values() for name in same}

        def placed(changed: Mapping[str, _Change]) -> dict[str, _Change]:
            by_names = ((names.get(name, [name]), change) for name, change in changed.items())
            return {
                in_files.get(name, name): change
                for same, change in by_names
                for name in [each for each in same if each in in_files] or same[:1]
            }

        return replace(self, pairs=placed(self.pairs), whole=placed(self.whole), rows=placed(self.rows))


def merged_bytes(base: Path, adapter: Adapter) -> int:
    """Bytes of the merged weights on disk, headers left out. Raises `UsageError` as `merge`."""
    return sum(source.bytes for source in _results(base, adapter).values())


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
    sources = _results(base, adapter)
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
        if name in adapter.whole:
            return adapter.whole[name].to(dtype)
        if name in adapter.rows:
            tokens, of_tokens = adapter.rows[name]
            grown = torch.empty(source.shape, dtype=dtype)
            before = file.get_tensor(name)
            grown[: len(before)] = before
            grown[list(tokens)] = of_tokens.to(dtype)
            return grown
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


def _results(base: Path, adapter: Adapter) -> dict[str, Stored]:
    """What the merged weights are made of, in their own shapes: an embedding may have grown by rows for added tokens.

    Raises:
        UsageError: the adapter changes weights that the base's files do not have by that name and shape.
    """
    sources = stored_tensors(base)
    shapes: dict[str, tuple[int, ...]] = {name: (b.shape[0], a.shape[1]) for name, (a, b) in adapter.pairs.items()}
    for name in [*shapes, *adapter.whole, *adapter.rows]:
        if name not in sources:
            raise UsageError(
                f"the adapter adapts {name}, which the weights in {str(base)!r} do not have, or transformers makes of "
                "several on loading. PEFT's merge_and_unload on the loaded model does it, in as much memory as the "
                "model takes"
            )
    for name, tensor in adapter.whole.items():
        before = sources[name].shape
        shapes[name] = tuple(tensor.shape)
        if len(before) == 2 and tensor.shape[0] > before[0]:
            sources[name] = _grown(sources[name], tensor.shape[0])
    for name, (tokens, rows) in adapter.rows.items():
        had, known = sources[name].shape[0], set(tokens)
        needed = max(had, max(tokens) + 1)
        shapes[name] = (needed, rows.shape[1])
        if known.issuperset(range(had, needed)):
            sources[name] = _grown(sources[name], needed)
    for name, shape in shapes.items():
        if sources[name].shape != shape:
            raise UsageError(
                f"the adapter's {name} is {shape}, and the base's {sources[name].shape}: this is an adapter of another "
                "model"
            )
    return sources


def _grown(source: Stored, rows: int) -> Stored:
    shape = (rows, *source.shape[1:])
    return replace(source, shape=shape, bytes=source.bytes // source.shape[0] * rows)
