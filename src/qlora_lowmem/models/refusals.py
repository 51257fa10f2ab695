"""Why a model cannot be fine-tuned here, told before its weights are read, in the same words by every command.

Already quantised, no causal language model, an architecture or an attention that transformers does not know, a
configuration that does not hold together, a damaged file: each has its own cause, and its own way out.
"""

import re
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.sources import ModelSource, hub_out_of_reach
from qlora_lowmem.models.trusted import damaged_file
from qlora_lowmem.models.wrappers import is_wrapper
from qlora_lowmem.recipe import Recipe


def check_config(recipe: Recipe, config: Any) -> None:
    """Refuse a model that is quantised by another method than bitsandbytes' 4 bits, or is no causal language model.

    Raises:
        UsageError: it is.
    """
    model, method = recipe.base.model, quantised_by(config)
    if method is not None and method != BNB_4BIT:
        raise UsageError(
            f"base.model: {model!r} is already quantised ({method}). QLoRA quantises 16-bit weights itself, and merges "
            "adapters into them: give the 16-bit model that this one was made of (its page names it as base_model)"
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_wrapper(config)
    causal = writes and not (encodes or config.is_encoder_decoder)
    if not causal and not own_code:
        classes = ", ".join(config.architectures or ()) or "none"
        raise UsageError(
            f"base.model: {model!r} is no causal language model, and only those are fine-tuned here: its model_type is "
            f"{config.model_type!r}, its classes are {classes}. Give a model that writes text from left to right "
            "(a class that ends in ForCausalLM)"
        )


BNB_4BIT = "bitsandbytes, 4 bits"


def quantised_by(config: Any) -> str | None:
    """The method that a model's weights are stored by, as transformers calls it; None where they are 16-bit."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    content = found if isinstance(found, dict) else found.to_dict()
    method = str(content.get("quant_method", "bitsandbytes"))
    if method.startswith("bitsandbytes"):
        return BNB_4BIT if content.get("load_in_4bit") else "bitsandbytes, 8 bits"
    return method


def check_weights(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder whose weights are not whole; their headers are read, which say how long they are.

    Raises:
        UsageError: names the first file that is damaged.
    """
    damage = damaged_file(folder, "*.safetensors", "*.safetensors.index.json")
    if damage is not None:
        raise _damaged(recipe, *damage, "copy it again from its source")


def cannot_make(recipe: Recipe, model_type: str, error: Exception) -> UsageError:
    """Why transformers does not make a model, or its configuration, of what `config.json` says."""
    model, reason = recipe.base.model, _first_line(error)
    if "attention implementation" in reason:
        return UsageError(
            f"base.attention: {recipe.base.attention!r}, and {model!r} cannot: transformers {transformers.__version__} "
            f"has it not for {reason.split()[0]}. Allowed here is auto or eager; set base.attention to auto "
            "(--attention auto)"
        )
    if isinstance(error, ImportError):
        return UsageError(f"base.model: {model!r} needs a package that is not installed: {reason}")
    return UsageError(
        f"base.model: transformers {transformers.__version__} makes no {model_type} of the config.json of {model!r} "
        f"({type(error).__name__}: {reason}). A field is missing there or does not go with another: compare it with "
        "the one that the model's makers publish"
    )


def cannot_load(recipe: Recipe, source: ModelSource, error: Exception) -> UsageError:
    """Why the model or its tokenizer does not load: its code or architecture, a damaged file, else the library's
    words."""
    model, reason = recipe.base.model, _first_line(error)
    if not recipe.base.trust_remote_code and "trust_remote_code" in str(error):
        return UsageError(
            f"base.trust_remote_code: false, and {model!r} needs Python code of its own repository. Set it "
            "to true only if you trust its authors: the code may do anything"
        )
    unknown = re.search("model type `(.+?)` but Transformers does not recognize", str(error))
    if unknown is not None:
        return UsageError(
            f"base.model: transformers {transformers.__version__} does not know the architecture {unknown[1]!r} of "
            f"{model!r}. A newer one may (python -m pip install --upgrade transformers); check model_type in its "
            "config.json"
        )
    folder = source.folder or _fetched(recipe, source)
    damage = damaged_file(folder) if folder is not None else None
    if damage is not None and source.folder is not None:
        return _damaged(recipe, *damage, "copy it again from its source")
    if damage is not None:  # in the hub's cache a file is a link to its content, which would be linked again
        return _damaged(recipe, damage[0].resolve(), damage[1], "remove that file, and it is fetched again")
    if source.folder is not None:
        return UsageError(
            f"base.model: {model!r} could not be loaded from {str(source.folder)!r} ({reason}). Its files "
            "can be read but are not what they should be: copy the folder again from its source"
        )
    return UsageError(
        f"base.model: {model!r} could not be loaded ({hub_out_of_reach() or reason}). Check the name and the "
        "connection to the hub, log in if the model is gated, or give a local folder; for memory alone, set "
        "base.weights to 'random'"
    )


def _damaged(recipe: Recipe, path: Path, why: str, repair: str) -> UsageError:
    return UsageError(
        f"base.model: {recipe.base.model!r} has a damaged file: {str(path)!r} ({why}). To repair it, {repair}"
    )


def _fetched(recipe: Recipe, source: ModelSource) -> Path | None:
    """Where a model of the hub lies in the cache, if it does; the hub is not asked."""
    if source.hub_id is None:
        return None
    try:
        return Path(snapshot_download(source.hub_id, revision=recipe.base.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    """What it says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
