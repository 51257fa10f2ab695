"""What a folder's safetensors files hold, read from their headers, and whether the model of its config.json is that.

transformers draws a weight at random that no file has, and casts whatever has another dtype. So names, shapes and
dtypes are compared here, on the meta device, before a byte of weights is read.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import is_file
from qlora_lowmem.models.refusals import BNB_4BIT, quantised_by
from qlora_lowmem.models.trusted import FLOATS, read_json, reading
from qlora_lowmem.recipe import Recipe

BASE_ADVICE = "Fetch or copy the base model's file again"
_PACKED = ".quant_state.bitsandbytes__"
_WIDTHS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the base model is, and how large it will be in 16 bits.

    `state` names what belongs to a weight that bitsandbytes has in 4 bits, by the ends of their names; else empty.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    state: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether it is a weight of 16 bits or more, or stands for one."""
        return bool(self.state) or self.dtype in FLOATS


def stored_tensors(base: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files; read are headers, and the shapes of what is in 4 bits.

    Raises:
        UsageError: one of those that transformers would read cannot be read.
    """
    found = {}
    for path in _weight_files(base):
        with reading(path, BASE_ADVICE), safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in [each for each in names if _PACKED in each]:
                weight = name.partition(_PACKED)[0]
                beside = {each for each in names if each.startswith(f"{weight}.")}
                shape = tuple(json.loads(bytes(file.get_tensor(name).tolist()))["shape"])
                state = tuple(each.removeprefix(f"{weight}.") for each in sorted(beside))
                found[weight] = Stored(path, shape, "4 bits", 2 * math.prod(shape), state)
                names -= beside | {weight}
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                if name not in names:
                    continue
                part: Any = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
                width = 2 if kind in FLOATS else _WIDTHS.get(kind, 1)
                found[name] = Stored(path, shape, kind, width * math.prod(shape))
    return found


def _weight_files(base: Path) -> list[Path]:
    """The files that transformers would read: some models keep the same weights in another layout beside them."""
    whole, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if is_file(whole) or not is_file(index):
        return [whole]
    content = read_json(index, BASE_ADVICE)
    with reading(index, BASE_ADVICE):
        return sorted({base / Path(name).name for name in content["weight_map"].values()})


@dataclass(frozen=True)
class _Place:
    """Where a stored tensor goes: the parameters' names, one unless it is `part` of what transformers converts."""

    names: tuple[str, ...]
    part: bool


def _places(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, _Place]:
    """As `convert_and_load_state_dict_in_model` (transformers/core_model_loading.py) finds a weight's place.

    Args:
        model: on any device, `meta` included.
    """
    conversions, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    targets = {source: each.target_patterns for each in converters for source in each.source_patterns}
    found = {}
    for name in stored:
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, converted = rename_source_key(name, [], [], model.base_model_prefix, state)
        of = targets[converted] if converted is not None else [""]
        found[name] = _Place(tuple(key.replace(of[0], each) if each else key for each in of), converted is not None)
    return found


def names_in_files(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """By the name of a weight in the model: that in the files. What transformers makes of several is not there."""
    return {place.names[0]: name for name, place in _places(model, stored).items() if not place.part}


def check_stored(recipe: Recipe, model: PreTrainedModel, folder: Path) -> None:
    """Refuse weights that are not those of the model that `config.json` makes.

    Args:
        model: on the meta device.

    Raises:
        UsageError: weights that are missing, of another shape, of a dtype that is no weight's, or of layers that the
            model has not; a file of theirs that cannot be read.
    """
    stored = stored_tensors(folder)
    faults = _faults(model, stored)
    if faults:
        raise UsageError(
            f"base.model: {recipe.base.model!r}: the weights are not those of its config.json, which makes a "
            f"{type(model).__name__}: {'; '.join(faults)}. Take config.json and all *.safetensors from one place"
        )


def _faults(model: PreTrainedModel, stored: Mapping[str, Stored]) -> list[str]:
    state, places = model.state_dict(), _places(model, stored)
    whole = {place.names[0]: stored[name] for name, place in places.items() if not place.part}
    shapes = [
        f"{name} is {_shown(whole[name].shape)} there and {_shown(tensor.shape)} here"
        for name, tensor in state.items()
        if name in whole and whole[name].shape != tuple(tensor.shape)
    ]
    dtypes = [
        f"{name} is stored as {whole[name].dtype}"
        for name, tensor in state.items()
        if name in whole and tensor.is_floating_point() and not whole[name].is_float
    ]
    packed, said = any(each.state for each in stored.values()), quantised_by(model.config) == BNB_4BIT
    form = {
        (True, False): ["they are in 4 bits, and quantization_config does not say so"],
        (False, True): ["quantization_config says that they are in 4 bits, and none is"],
    }.get((packed, said), [])
    there = {name for place in places.values() for name in place.names}
    missing = [name for name in _needed(model) if name not in there]
    beyond = [name for name, place in places.items() if _of_no_layer(model, place.names[0], state)]
    return [
        *_listed("missing", missing),
        *_listed("of another shape", shapes),
        *_listed("no weights", dtypes),
        *_listed("of layers beyond the last", beyond),
        *form,
    ]


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"] if names else []


def _shown(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _needed(model: PreTrainedModel) -> list[str]:
    """The parameters that must be in the files: one of those that are tied is enough, and some are made on loading."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [name for name in names if name not in tied and not any(pattern.search(name) for pattern in ignored)]


def _of_no_layer(model: PreTrainedModel, name: str, state: Mapping[str, Any]) -> bool:
    """Whether it is a weight of a layer past the last: the model would be trained without that part of itself."""
    if name in state or getattr(model.config.get_text_config(), "num_nextn_predict_layers", None):
        return False
    if any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return False
    return re.sub(r"\.\d+\.", ".0.", name) in state
