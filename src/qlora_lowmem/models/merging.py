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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS, check_adapter, read_json, reading

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TILE_BYTES = 32 * 2**20  # of fp32 rows; with their 16-bit source and result, 64 MiB on the device
_SHARD_BYTES = 2 * 2**30
_PREFIX = "base_model.model."
_PACKED = ".quant_state.bitsandbytes__"
_ADAPTER_ADVICE = "Give the folder of another checkpoint of the run, or train again"
_BASE_ADVICE = "Fetch or copy the base model's file again"
# What of a PEFT configuration (peft/tuners/lora/config.py) changes the formula: these must be as LoRA's paper has them.
_PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by the name of the weight that they adapt: A is (r, in_features), B is (out_features, r)."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """The adapter in a run's output folder or one of its checkpoints.

        Raises:
            UsageError: there is none, it cannot be read, or it is more than plain LoRA on Linear modules.
        """
        check_adapter(folder)
        config_file, weights_file = folder / "adapter_config.json", folder / ADAPTER_WEIGHTS
        config = read_json(config_file, _ADAPTER_ADVICE)
        with reading(config_file, _ADAPTER_ADVICE):
            # peft/tuners/lora/layer.py, `LoraLayer.update_layer`; rsLoRA: Kalajdzievski 2023, section 3.
            scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        for name, plain in _PLAIN.items():
            if config.get(name, plain) != plain:
                raise UsageError(
                    f"{config_file}: {name} is {config[name]!r}; only plain LoRA adapters can be "
                    "merged here. PEFT's merge_and_unload does the others"
                )
        halves: dict[str, dict[str, Tensor]] = {}
        with reading(weights_file, _ADAPTER_ADVICE), safe_open(weights_file, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                module, _, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
                if half not in ("lora_A", "lora_B"):
                    raise UsageError(f"{weights_file}: {key} belongs to no LoRA adapter of a Linear module")
                halves.setdefault(f"{module}.weight", {})[half] = file.get_tensor(key).float()
            pairs = {name: (half["lora_A"], half["lora_B"]) for name, half in halves.items()}
        return cls(pairs, scale)

    def of(self, model: torch.nn.Module) -> "Adapter":
        """For the weights as `model` (on any device) stores them: GPT-2's Conv1D is (in_features, out_features)."""
        turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        pairs = {name: (b.T, a.T) if name in turned else (a, b) for name, (a, b) in self.pairs.items()}
        return replace(self, pairs=pairs)

    def in_names_of(self, base: Path, model: PreTrainedModel) -> "Adapter":
        """The same by the names that the weights have in the base's files, as transformers converts them on loading.

        As `convert_and_load_state_dict_in_model` (transformers/core_model_loading.py) finds a weight's place. A weight
        that it makes of several keeps its own name, which no file has.

        Args:
            model: the base model on the meta device.
        """
        conversions, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        in_files = {}
        for name in _sources(base):
            key, made_of_several = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if key not in state and name in state:
                key, made_of_several = name, None
            if made_of_several is None:
                in_files[key] = name
        return replace(self, pairs={in_files.get(name, name): pair for name, pair in self.pairs.items()})


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the base model is, and how large it will be.

    `state` names what belongs to a weight that bitsandbytes has in 4 bits, by the ends of their names; else empty.
    """

    file: Path
    shape: tuple[int, ...]
    is_float: bool
    bytes: int
    state: tuple[str, ...] = ()


def merged_bytes(base: Path) -> int:
    """Bytes of the merged weights on disk, headers left out."""
    return sum(source.bytes for source in _sources(base).values())


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
    sources = _sources(base)
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


def _merged(name: str, source: _Source, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor of the result, in host memory."""
    with reading(source.file, _BASE_ADVICE), safe_open(source.file, framework="pt") as file:
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


def _dequantised(name: str, source: _Source, file: Any, device: torch.device) -> Tensor:
    """A weight from its 4 bits: its numbers' scales and their table stand beside it (bitsandbytes/functional.py)."""
    state = {end: file.get_tensor(f"{name}.{end}") for end in source.state}
    weight: Tensor = dequantize_4bit(file.get_tensor(name).to(device), QuantState.from_dict(state, device))
    return weight


def _sources(base: Path) -> dict[str, _Source]:
    """Every tensor of the folder's safetensors files; read are headers, and the shapes of what is in 4 bits."""
    found = {}
    for path in _weight_files(base):
        with reading(path, _BASE_ADVICE), safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in [each for each in names if _PACKED in each]:
                weight = name.partition(_PACKED)[0]
                beside = {each for each in names if each.startswith(f"{weight}.")}
                shape = tuple(json.loads(bytes(file.get_tensor(name).tolist()))["shape"])
                state = tuple(each.removeprefix(f"{weight}.") for each in sorted(beside))
                found[weight] = _Source(path, shape, True, 2 * math.prod(shape), state)
                names -= beside | {weight}
            for name in file.keys():  # noqa: SIM118
                if name not in names:
                    continue
                part: Any = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
                is_float = kind in ("F64", "F32", "F16", "BF16")
                width = 2 if is_float else {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}.get(kind, 1)
                found[name] = _Source(path, shape, is_float, width * math.prod(shape))
    return found


def _weight_files(base: Path) -> list[Path]:
    """The files that transformers would read: some models keep the same weights in another layout beside them."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        content = read_json(index, _BASE_ADVICE)
        with reading(index, _BASE_ADVICE):
            return sorted({base / Path(name).name for name in content["weight_map"].values()})
    return [base / "model.safetensors"]


def _shards(sources: Mapping[str, _Source]) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, source in sources.items():
        if not shards or source.bytes > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= source.bytes
    return shards


def _check_fit(adapter: Adapter, sources: Mapping[str, _Source], base: Path) -> None:
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
