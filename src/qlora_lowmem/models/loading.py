"""Load a base model on one device in 4 bits, or fail: nothing is placed on another device or on disk."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_lowmem.environment import processes
from qlora_lowmem.errors import QloraLowmemError, UsageError
from qlora_lowmem.files import cache_folder, whole_folder
from qlora_lowmem.lean import quantise_embeddings
from qlora_lowmem.models import wrappers
from qlora_lowmem.models.random_weights import (
    config_from,
    meta_model,
    random_model,
    stand_in_tokenizer,
    untied_weights,
    with_backbone,
)
from qlora_lowmem.models.refusals import cannot_load, cannot_make, check_config, check_weights
from qlora_lowmem.models.sources import ModelSource, hub_out_of_reach
from qlora_lowmem.models.stored import check_stored
from qlora_lowmem.models.targets import EMBEDDING_BITS, READ_PAST, lean_refusals
from qlora_lowmem.models.vocabulary import add_tokens, begin_rows, grow, indices_of
from qlora_lowmem.recipe import Recipe

# transformers' words where weights do not become the model's (modeling_utils.py, core_model_loading.py).
_LOADING_REPORT = re.compile("automatic conversion of the weights|ignore_mismatched_sizes|loading state_dict")


def _bitsandbytes_config(
    recipe: Recipe, compute_dtype: torch.dtype, model: PreTrainedModel
) -> BitsAndBytesConfig | None:
    if not recipe.quantization.load_in_4bit:
        return None
    past = READ_PAST.get(model.config.get_text_config().model_type)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization.quant_type,
        bnb_4bit_use_double_quant=recipe.quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*get_keys_to_not_convert(model), *past] if past else None,
        bnb_4bit_quant_storage=torch.bfloat16 if recipe.quantization.quant_storage == "bf16" else torch.uint8,
    )


def _load_config(recipe: Recipe, source: ModelSource) -> Any:
    if source.architecture is not None and source.folder is None and source.gguf is None:
        return config_from(source.architecture)
    location = str(source.gguf.parent) if source.gguf else _location(source)
    options = {"gguf_file": source.gguf.name} if source.gguf else {"revision": recipe.base.revision}
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=recipe.base.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise cannot_load(recipe, source, error) from error
    except Exception as error:  # whatever the checks of a model's own configuration class raise
        raise cannot_make(recipe, "configuration", error) from error
    check_config(recipe, config)
    if source.folder is not None:
        check_weights(recipe, source.folder)
    return config


def skeleton(recipe: Recipe, source: ModelSource, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model on the meta device: what modules there are, before a byte of weights is read.

    Args:
        dtype: what random weights will be in (default: bf16).

    Raises:
        UsageError: the hub cannot be reached; the model is none that can be fine-tuned; a file of its is damaged;
            transformers cannot make it so; the weights of its folder are those of another model; it cannot grow by the
            tokens that the recipe adds.
    """
    base, config = recipe.base, _load_config(recipe, source)
    try:
        model = meta_model(config, dtype or torch.bfloat16, base.attention, base.trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # whatever the classes of transformers make of a configuration that is not whole
        raise cannot_make(recipe, config.model_type, error) from error
    folder = source.folder if source.gguf is None else None
    if base.weights == "pretrained" and folder is not None:
        check_stored(recipe, model, folder)
    if recipe.data.added_tokens:
        grow(model, indices_of(load_tokenizer(recipe, source), recipe.data.added_tokens))
    return model


def load_base(
    recipe: Recipe,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    on_meta: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The base model on `device`, Linear modules in 4 bits, the rest in `dtype`.

    Args:
        on_meta: its `skeleton` in `dtype`, where there is one already: random weights are put into it.

    Raises:
        UsageError: weights that cannot be found; embeddings that cannot be quantised.
        torch.cuda.OutOfMemoryError: it does not fit.
    """
    on_meta = on_meta or skeleton(recipe, source, dtype)
    quantization = _bitsandbytes_config(recipe, dtype, on_meta)
    bits = EMBEDDING_BITS[recipe.lean.quantised_embeddings]
    if recipe.base.weights == "random":
        with lean_refusals(recipe):
            model = random_model(on_meta, dtype, quantization, device, bits)
    else:
        model = _pretrained(recipe, source, dtype, device, quantization)
        if recipe.data.added_tokens:
            added = indices_of(load_tokenizer(recipe, source), recipe.data.added_tokens)
            grow(model, added)
            begin_rows(model, added)
        if bits is not None:
            embedding: Any = model.get_input_embeddings()
            embedding.weight.requires_grad_(False)
            # So that it is never on the device beside its quantised self.
            embedding.weight.data = embedding.weight.data.cpu()
            with lean_refusals(recipe):
                quantise_embeddings(model, bits, device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, `Linear4bit.forward` without gradients packs 4-bit weights anew, in place and
            # less precisely (bitsandbytes/nn/modules.py), and training would go on from those.
            module.support_avx512bf16_for_cpu = False
    return model


def _pretrained(
    recipe: Recipe,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    quantization: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    try:
        model = wrappers.from_pretrained(
            _location(source),
            revision=recipe.base.revision,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=None if recipe.base.attention == "auto" else recipe.base.attention,
            trust_remote_code=recipe.base.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _LOADING_REPORT.search(str(error)):
            raise  # memory that ran out
        raise cannot_load(recipe, source, error) from error
    with_backbone(model)
    assert_on_device(model, device)
    return model


def weights_folder(recipe: Recipe, source: ModelSource) -> Path:
    """Where the base model's 16-bit safetensors files lie; fetched from the hub if need be, loaded nowhere.

    Raises:
        UsageError: the hub cannot be reached, or does not know the model.
    """
    if source.gguf is not None or source.folder is not None:
        return Path(_location(source))
    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(_location(source), revision=recipe.base.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise cannot_load(recipe, source, error) from error


def assert_on_device(model: torch.nn.Module, device: torch.device) -> None:
    """Every parameter and buffer lies on `device`.

    Raises:
        QloraLowmemError: something was placed elsewhere; names the first such tensors.
    """
    stray = [
        f"{name} on {tensor.device}"
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index)
    ]
    if stray:
        raise QloraLowmemError(
            f"{len(stray)} tensors of the model are not on {device}: {', '.join(stray[:3])}. Training would run from "
            "system memory without a word, so it stops here. Please report this with the recipe."
        )


def load_tokenizer(recipe: Recipe, source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the tokens that the recipe adds; without pretrained weights and tokenizer files, a
    stand-in for synthetic data.

    Raises:
        UsageError: the tokenizer cannot be found or read, or real data was asked for without one; it has a token that
            the recipe adds.
    """
    has_one = source.gguf is not None or (source.folder is not None and (source.folder / "tokenizer.json").is_file())
    if not has_one and recipe.base.weights == "random":
        if recipe.data.data != "synthetic":
            raise UsageError(
                "data.data: text needs a tokenizer, and random weights come without one. Set data.data to 'synthetic', "
                "put tokenizer.json into the model's folder, or set base.weights to 'pretrained'"
            )
        tokenizer = stand_in_tokenizer()
        add_tokens(tokenizer, recipe.data.added_tokens or (), recipe.base.model)
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _location(source),
            revision=recipe.base.revision,
            # Always said: left open, transformers would ask on standard input.
            trust_remote_code=recipe.base.trust_remote_code,
        )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # tokenizers raises a bare one for a file that is no tokenizer
        raise cannot_load(recipe, source, error) from error
    add_tokens(tokenizer, recipe.data.added_tokens or (), recipe.base.model)
    return tokenizer


def _location(source: ModelSource) -> str:
    """A folder of safetensors files, or the hub id, as `from_pretrained` takes it."""
    if source.gguf is not None or source.folder is not None:
        return str(_safetensors_of(source.gguf) if source.gguf else source.folder)
    hub_out_of_reach()
    return str(source.hub_id)


def _safetensors_of(gguf: Path) -> Path:
    """A GGUF file converted once to a folder of bf16 safetensors, which then loads in 4 bits like any model.

    transformers dequantises a GGUF file on load but cannot quantise it again in the same call, and `save_pretrained`
    refuses a GGUF-loaded model, so the state dict is saved.
    """
    from safetensors.torch import save_file

    stat = gguf.stat()
    folder = cache_folder("models") / f"{gguf.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    if (folder / "config.json").is_file():
        return folder
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        weights = {name: tensor.contiguous() for name, tensor in untied_weights(model).items()}
        content = model.config.to_dict()
        content.pop("quantization_config", None)
        with whole_folder(folder) as scratch:
            save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(scratch)
            (scratch / "config.json").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
    except ImportError as error:
        raise UsageError(
            f"base.model: reading a GGUF file needs the package gguf ({error}): pip install gguf"
        ) from None
    return folder


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """`compute`: of the base model and autocast. `adapter`: of the LoRA weights, and of Adam's state unless the recipe
    gives it a dtype of its own."""

    compute: torch.dtype
    adapter: torch.dtype

    @property
    def loss_scaling(self) -> bool:
        """fp16 gradients underflow without a scaled loss; PyTorch's scaler then needs fp32 adapters."""
        return self.compute is torch.float16


def choose_precision(recipe: Recipe, device: str, supports_bf16: bool) -> Precision:
    """Resolve `auto`: bf16 where the device has it, fp16 with loss scaling on Turing, fp32 on a CPU.

    bf16 adapters follow QLoRA (Dettmers et al. 2023, section 3) and TRL; with fp16 they stay fp32, because PyTorch's
    gradient scaler unscales fp32 gradients only.

    Raises:
        UsageError: bf16 asked of a card without it, bf16 adapters with an fp16 base, or as `check_gradient_release`.
    """
    asked = recipe.quantization.compute_dtype
    if asked == "auto":
        asked = "fp32" if device == "cpu" else "bf16" if supports_bf16 else "fp16"
    if asked == "bf16" and device != "cpu" and not supports_bf16:
        raise UsageError(
            "quantization.compute_dtype: 'bf16' needs compute capability 8.0 or higher (Ampere), and this card is "
            "older. Use 'auto' or 'fp16'"
        )
    if asked == "fp16" and device == "cpu":
        raise UsageError("quantization.compute_dtype: 'fp16' is for GPUs. On a CPU use 'auto', 'fp32' or 'bf16'")
    compute = _DTYPES[asked]
    adapter = recipe.lora.adapter_dtype
    if adapter == "auto":
        adapter = "bf16" if compute is torch.bfloat16 else "fp32"
    if adapter == "bf16" and compute is torch.float16:
        raise UsageError(
            "lora.adapter_dtype: 'bf16' does not go with an fp16 base, whose gradient scaler needs fp32 adapters. "
            "Use 'auto' or 'fp32'"
        )
    precision = Precision(compute=compute, adapter=_DTYPES[adapter])
    check_gradient_release(recipe, loss_scaling=precision.loss_scaling)
    return precision


def check_gradient_release(recipe: Recipe, *, loss_scaling: bool) -> None:
    """Refuse gradient release where something else needs the gradients after backward, and not the recipe alone tells.

    Raises:
        UsageError: the loss is scaled, as in fp16, or several processes train together.
    """
    if not recipe.optimizer.gradient_release:
        return
    if loss_scaling:
        raise UsageError(
            "optimizer.gradient_release: true, and this card computes in fp16, whose loss scaling looks at all "
            "gradients before a step. Set optimizer.gradient_release to false, or quantization.compute_dtype to fp32"
        )
    if processes() > 1:
        raise UsageError(
            f"optimizer.gradient_release: true, and {processes()} processes train together, which average their "
            "gradients after they are complete. Set optimizer.gradient_release to false, or start one process"
        )
