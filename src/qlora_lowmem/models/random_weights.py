"""Random weights of an exact architecture, in 4 bits, one matrix at a time.

Memory does not depend on the weights' values, so a benchmark needs no download. The peak while building is the
model in its final form plus one matrix in 16 bits, never the full-precision model. A checkpoint of zeros, for what
reads weights from files, is a header and a hole: no disk, no time, and every byte of memory of the pretrained one.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_lowmem.lean import quantise_embeddings
from qlora_lowmem.models import wrappers


def config_from(architecture: dict[str, Any]) -> Any:
    """A transformers configuration from the content of a `config.json`."""
    return AutoConfig.for_model(**{k: v for k, v in architecture.items() if k not in ("torch_dtype", "dtype")})


def meta_model(config: Any, dtype: torch.dtype, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a configuration on the meta device: names and shapes, no memory.

    Args:
        attention: `auto` is sdpa where transformers has it for the model's class, else eager.
    """
    chosen = None if attention == "auto" else attention
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": chosen, "trust_remote_code": trust_remote_code}
    with torch.device("meta"), _embeddings_as_they_are():
        model = wrappers.from_config(config, **options)
    return with_backbone(model)


def with_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose prefix names its backbone: TRL's fused loss reads it there. Llama 4's own names none."""
    if not hasattr(model, model.base_model_prefix):
        words = model.get_input_embeddings()
        holds_words = (name for name, child in model.named_children() if words in list(child.modules())[1:])
        model.base_model_prefix = next(holds_words, model.base_model_prefix)
    return model


@contextmanager
def _embeddings_as_they_are() -> Iterator[None]:
    """PyTorch draws an embedding's values as it makes one. On the meta device it imports SymPy, and draws none."""
    draw = torch.nn.Embedding.reset_parameters
    torch.nn.Embedding.reset_parameters = lambda _: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Embedding.reset_parameters = draw  # type: ignore[method-assign]


def random_model(
    model: PreTrainedModel,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
    embedding_bits: int | None = None,
) -> PreTrainedModel:
    """Give a `meta_model` random weights on `device`, its Linear modules in 4 bits if `quantization` says so.

    The same quantizer object of transformers chooses the modules as in `from_pretrained`, so what is in 4 bits
    here is what is in 4 bits there, and every tensor has the dtype that it has there (`_get_dtype_plan`:
    modeling_utils.py). With `embedding_bits` (8 or 4), the tied embeddings are quantised before the rest is made.

    Raises:
        torch.cuda.OutOfMemoryError: the model does not fit `device`.
    """
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        with local_torch_dtype(dtype):  # biases of 4-bit layers
            quantizer.preprocess_model(model, device_map={"": device})
    for pattern, kept in model._get_dtype_plan(dtype).items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    made: dict[int, torch.nn.Parameter] = {}  # a tied weight is made once
    if embedding_bits is not None:
        embedding: Any = model.get_input_embeddings()
        _materialise(embedding, dtype, device, spread, made)
        embedding.weight.data.normal_(std=spread)
        embedding.weight.requires_grad_(False)
        model.tie_weights()
        quantise_embeddings(model, embedding_bits)
        del embedding
        made.clear()
    for module in list(model.modules()):
        _materialise(module, dtype, device, spread, made)
    if embedding_bits is None:
        model.tie_weights()
    # Sets what has a formula: norms, Mamba's A_log and dt_bias, the rotary frequencies, embeddings.
    model.initialize_weights()
    if quantization is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer  # transformers' Trainer asks it whether the model can be trained
    model.eval()
    return model


def _materialise(
    module: torch.nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    spread: float,
    made: dict[int, torch.nn.Parameter],
) -> None:
    """Give one module's own tensors memory on `device`; a 4-bit weight is drawn in `dtype`, packed, and let go."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None or parameter.device.type == device.type:
            continue
        if isinstance(module, Linear4bit) and name == "weight":
            drawn = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device)
            drawn.normal_(std=spread)
            settings = {key: value for key, value in parameter.__dict__.items() if not key.startswith("_is_hf")}
            packed: Any = Params4bit(drawn, requires_grad=False, **settings)
            module.weight = packed = packed.to(device)
            packed._is_hf_initialized = True
        else:
            if id(parameter) not in made:
                empty = torch.empty(
                    parameter.shape, dtype=parameter.dtype, device=device
                )  # like a meta one needs SymPy
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    for name, buffer in list(module._buffers.items()):
        if buffer is not None and buffer.device.type != device.type:
            empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            module._buffers[name] = empty if buffer.is_meta else buffer.to(device)


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer that knows no words, for samples that are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def untied_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model without what is tied to another part of it, as checkpoints hold it."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def write_zero_checkpoint(architecture: dict[str, Any], folder: Path) -> None:
    """Make `folder` with config, tokenizer and bf16 weights of `architecture` (the content of a `config.json`).

    The file's format: https://huggingface.co/docs/safetensors (eight bytes of length, JSON, data).
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(architecture, indent=2) + "\n", encoding="utf-8")
    model = meta_model(AutoConfig.from_pretrained(folder), torch.bfloat16, "auto")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in untied_weights(model).items():
        begin, end = end, end + torch.bfloat16.itemsize * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    stand_in_tokenizer().save_pretrained(folder)
