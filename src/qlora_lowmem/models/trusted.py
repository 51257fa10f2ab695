"""What of a folder may be loaded: weights from safetensors, and pickles only where they hold plain data.

A pickle can run any code when it is read. transformers and accelerate read a checkpoint's optimizer, scheduler, random
state and gathered weights with `torch.load(weights_only=True)`, which builds tensors and plain values only; here such a
file is refused before anything is loaded, and by name. PyTorch reads the index of a sharded checkpoint with a plain
`pickle.load` (torch/distributed/checkpoint/filesystem.py), so it is read here first, with nothing allowed but what
PyTorch itself writes there.
"""

import contextlib
import pickle
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from qlora_lowmem import files
from qlora_lowmem.errors import UsageError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights of 16 bits or more, as a safetensors header names them
_STATE = ("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")
_SHARDS_INDEX = ".metadata"
_IN_AN_INDEX = {
    "torch": ("Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # where Python 3.13 has it
}


def check_checkpoint(folder: Path) -> None:
    """Refuse a checkpoint that could run code, before anything of it is read.

    Raises:
        UsageError: it is a link, has its adapter in a pickle, or a state that is more than plain data.
    """
    if folder.is_symlink():
        raise UsageError(
            f"run.output_dir: {str(folder)!r} is a link to {str(folder.resolve())!r}; a run goes on from its own "
            "checkpoints only. Copy the checkpoint into its place, or remove the link"
        )
    indices = sorted(folder.rglob(_SHARDS_INDEX))
    if not indices and not any(folder.glob("pytorch_model_fsdp*")):
        check_adapter(folder)
    states = [file for pattern in _STATE for file in sorted(folder.glob(pattern)) if file.is_file()]
    reasons = [(file, _unsafe_state(file)) for file in states] + [(file, _unsafe_index(file)) for file in indices]
    for file, unsafe in reasons:
        if unsafe is not None:
            raise UsageError(
                f"run.output_dir: {str(file)!r} is no plain state: {unsafe}. Loading it could run code, so it is not "
                "loaded. Remove this checkpoint and find out who wrote it; the run goes on from the one before"
            )


def check_adapter(folder: Path) -> None:
    """Refuse a folder whose adapter is not in safetensors.

    Raises:
        UsageError: it has none, or only a pickled one.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        raise UsageError(
            f"{str(folder)!r} holds its adapter as a pickle (adapter_model.bin), which can run code when it is loaded; "
            f"convert it to {ADAPTER_WEIGHTS} where you trust it"
        )
    raise UsageError(
        f"{str(folder)!r} holds no {ADAPTER_WEIGHTS}; give the output folder of a run that has ended, or one of its "
        "checkpoints"
    )


def _unsafe_state(file: Path) -> str | None:
    """What a file of `torch.save` would import beyond what `weights_only` builds; None if nothing. Runs none of it."""
    with safe_globals():
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        except Exception as error:  # whatever a crafted file provokes in the reader
            return f"it cannot be read as one ({type(error).__name__})"
    return f"it would import {', '.join(sorted(unsafe))}" if unsafe else None


def _unsafe_index(file: Path) -> str | None:
    """What the index of a sharded checkpoint would import beyond what PyTorch writes there; None if nothing."""
    try:
        with file.open("rb") as content:
            _IndexReader(content).load()
    except Exception as error:  # whatever a crafted file provokes in the reader
        return str(error) if isinstance(error, _ForeignError) else f"it cannot be read ({type(error).__name__})"
    return None


class _ForeignError(pickle.UnpicklingError):
    """A name that no index holds."""


class _IndexReader(pickle.Unpickler):
    """Finds the names of `_IN_AN_INDEX` and no other (docs.python.org/3/library/pickle.html, Restricting Globals)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 pickles a member of an enumeration
            return _member
        if name not in _IN_AN_INDEX.get(module, ()):
            raise _ForeignError(f"it would import {module}.{name}")
        return super().find_class(module, name)


def _member(owner: Any, name: str) -> Any:
    """A member of an enumeration, and no attribute of anything else."""
    if not isinstance(owner, EnumType) or name not in owner.__members__:
        raise _ForeignError(f"it would take {name} of {owner!r}")
    return owner[name]


_UNREADABLE = (OSError, ValueError, RecursionError, SafetensorError)


def damaged_file(folder: Path, *patterns: str) -> tuple[Path, str] | None:
    """The first file of the folder that is not whole, with the reason; None where all can be read.

    All are looked at, or those that match a pattern. Of weights, the headers are read, which say how long a file is.
    """
    for path in sorted(path for each in patterns or ("*.json", "*.safetensors") for path in folder.glob(each)):
        try:
            if path.suffix == ".json":
                files.read_json(path)
            else:
                with safe_open(path, framework="pt"):
                    pass
        except _UNREADABLE as error:
            return path, _reason(error)
    return None


@contextlib.contextmanager
def reading(path: Path, what_to_do: str) -> Iterator[None]:
    """Around the reading of one file.

    Raises:
        UsageError: it cannot be read, or holds something else than it should; names it.
    """
    try:
        yield
    except (*_UNREADABLE, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{str(path)!r} cannot be read ({_reason(error)}). {what_to_do}") from error


def read_json(path: Path, what_to_do: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: there is none.
    """
    with reading(path, what_to_do):
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise TypeError("it holds no object")
        return content


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
