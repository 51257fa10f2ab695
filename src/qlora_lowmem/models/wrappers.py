"""Wrappers: a language model with encoders of pictures or sound before it (Gemma 3, Qwen3-VL, Mistral 3).

Text goes through the language model alone. So a wrapper is made of its own class without its encoders: they are neither
read nor on the device, and every other module keeps the name that it has in the whole wrapper, which then takes the
adapters and the merged weights as they are.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

_PROJECTORS = ("multi_modal_projector", "connector")  # from an encoder's width to the language model's


def is_wrapper(config: Any) -> bool:
    """Whether a configuration is that of a wrapper which transformers has no model of the language alone for."""
    return _class_of(config) is not None


def from_config(config: Any, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """As `AutoModelForCausalLM.from_config`; of a wrapper, what text goes through."""
    kind = _class_of(config)
    if kind is None:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **options
        )
    else:
        model = _for_text(kind)._from_config(config, **options)
    return model


def from_pretrained(location: str, **options: Any) -> PreTrainedModel:
    """As `AutoModelForCausalLM.from_pretrained`; of a wrapper, what text goes through."""
    named = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    kind = _class_of(AutoConfig.from_pretrained(location, **named))
    loader: Any = AutoModelForCausalLM if kind is None else _for_text(kind)
    model: PreTrainedModel = loader.from_pretrained(location, **options)
    return model


def language_model_of(model: Any) -> str:
    """The name of the language model inside a wrapper; empty where the model is nothing else."""
    if not is_wrapper(model.config):
        return ""
    decoder = model.get_decoder()
    names: list[str] = [name for name, module in model.named_modules() if module is decoder]
    return names[0]


def _class_of(config: Any) -> Any:
    """The wrapper's class; None of what is no wrapper, or has a class ...ForCausalLM."""
    if config.get_text_config() is config:
        return None
    causal, wrapper = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = (causal if type(config) in causal else wrapper).get(type(config), None)
    return None if kind is None or kind.__name__.endswith("ForCausalLM") else kind


def _for_text(kind: Any) -> Any:
    """A wrapper's class, whose instances have no encoders. Of the same name, by which transformers converts weights."""

    def make(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        decoder, inner = self.get_decoder(), self.base_model
        encoders = [
            name
            for name, child in inner.named_children()
            if child is not decoder and (isinstance(child, PreTrainedModel) or name in _PROJECTORS)
        ]
        for name in encoders:
            delattr(inner, name)
        type(self)._keys_to_ignore_on_load_unexpected = [rf"\b{name}\." for name in encoders]

    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})
