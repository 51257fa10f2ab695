"""The sections of a recipe: frozen dataclasses whose field metadata is the reference of every knob.

A field's leaf name is unique over all sections, so it is also its flag: `max_seq_length` is `--max-seq-length`.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

SYNTHETIC = "synthetic"
DATA_SUFFIXES = (".jsonl", ".parquet")
# Names of files that are no data set's: `data/train.csv` is a wrong file, not an owner and a name.
_FILES = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|gz|bz2|zst|zip|tar|arrow|xlsx?|ya?ml|py|pkl|pt)$", re.IGNORECASE)
_HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[A-Za-z0-9][\w.\[\]%+:-]*)?", re.ASCII)
TARGET_PRESETS = ("attention", "attention-qv", "all-linear")

Kind = Literal["auto", "name", "modules", "memory", "data", "path"]


def knob(help: str, memory: str, *, kind: Kind = "auto", **limits: float) -> dict[str, Any]:
    """Metadata of a field: what it is, what it does to memory, and its limits.

    `kind` says how a value is checked where the annotation alone does not; `min` and `max` are allowed themselves,
    `above` and `below` are not.
    """
    return {"help": help, "memory": memory, "kind": kind, **limits}


def is_hub_data(text: str) -> bool:
    """Whether `text` is a data set's hub id with an optional split: `owner/name`, `owner/name:split`."""
    return bool(_HUB_DATA.fullmatch(text)) and not _FILES.search(text.partition(":")[0])


@dataclass(frozen=True)
class Base:
    """The base model, which stays frozen."""

    model: str = field(
        default="ibm-granite/granite-4.0-h-1b",
        metadata=knob(
            "hub id, local folder, GGUF file or name of a known architecture",
            "its 4-bit weights and its embeddings are the floor of every run",
        ),
    )
    revision: str | None = field(
        default=None, metadata=knob("branch, tag or commit of the model on the hub; null is the newest", "none")
    )
    weights: Literal["pretrained", "random"] = field(
        default="pretrained",
        metadata=knob(
            "pretrained weights, or random ones of the same shapes (a memory test needs no download)",
            "none: the same shapes take the same bytes",
        ),
    )
    attention: Literal["sdpa", "eager"] = field(
        default="sdpa",
        metadata=knob(
            "implementation of attention",
            "eager stores (batch, heads, seq, seq) scores for backward: quadratic in the sequence; sdpa does not",
        ),
    )
    trust_remote_code: bool = field(
        default=False, metadata=knob("run the model repository's own Python code; only for authors you trust", "none")
    )


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are stored."""

    load_in_4bit: bool = field(
        default=True,
        metadata=knob(
            "store the linear layers in 4 bits (QLoRA); false keeps them in the compute dtype (LoRA)",
            "about a quarter of the bytes of bf16; embeddings and LM head stay 16-bit",
        ),
    )
    quant_type: Literal["nf4", "fp4"] = field(
        default="nf4",
        metadata=knob("code book of the 4-bit values; nf4 suits normal weights", "none: both are 4 bits"),
    )
    double_quant: bool = field(
        default=True,
        metadata=knob(
            "quantise the quantisation constants too", "saves about 0.37 bit a parameter: 47 MB a billion parameters"
        ),
    )
    quant_storage: Literal["uint8", "bf16"] = field(
        default="uint8",
        metadata=knob(
            "dtype that the packed 4-bit values are stored as; FSDP2 shards them over cards only as bf16",
            "none on one card: the same bytes",
        ),
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto",
        metadata=knob(
            "dtype of the arithmetic; auto is bf16 where the card has it, else fp16 with loss scaling",
            "fp32 doubles the activations and each dequantised weight",
        ),
    )


@dataclass(frozen=True)
class Lora:
    """The adapters: all that is trained."""

    lora_r: int = field(
        default=8,
        metadata=knob(
            "rank of the adapters",
            "adapters, gradients and optimizer state grow with it; small where few layers are targeted",
            min=1,
            max=4096,
        ),
    )
    lora_alpha: int = field(
        default=16,
        metadata=knob("scale of the adapters: alpha / r multiplies their output", "none", min=1, max=1_000_000),
    )
    lora_dropout: float = field(
        default=0.0,
        metadata=knob(
            "dropout on the adapters' input",
            "above 0, a mask and a dropped copy of each input are kept",
            min=0,
            below=1,
        ),
    )
    target_modules: str | tuple[str, ...] = field(
        default="attention",
        metadata=knob(
            "adapted layers: attention (q, k, v, o), attention-qv, all-linear, or a list of module names",
            "each adapted layer keeps its input for backward, and adds its adapter's gradients and optimizer state",
            kind="modules",
        ),
    )
    adapter_dtype: Literal["auto", "bf16", "fp32"] = field(
        default="auto",
        metadata=knob(
            "dtype of the adapters; auto is bf16 with bf16 arithmetic, else fp32",
            "bf16 halves the adapters, their gradients and their optimizer state",
        ),
    )


@dataclass(frozen=True)
class Batch:
    """How many tokens a step sees."""

    max_seq_length: int = field(
        default=1024,
        metadata=knob(
            "longest sample in tokens; longer ones are cut",
            "activations and logits grow with it: the strongest knob after checkpointing",
            min=2,  # the loss predicts each next token, so one token alone predicts nothing
            max=2**24,
        ),
    )
    batch_size: int = field(
        default=1, metadata=knob("samples a micro-step", "activations and logits grow with it", min=1, max=65536)
    )
    gradient_accumulation_steps: int = field(
        default=8,
        metadata=knob(
            "micro-steps before the optimizer steps",
            "none to speak of: gradients are summed in place, so batch_size 1 with 8 of these costs as 1",
            min=1,
            max=2**20,
        ),
    )
    packing: bool = field(
        default=False,
        metadata=knob(
            "join short samples until max_seq_length is full", "every step becomes as large as the longest sample"
        ),
    )


@dataclass(frozen=True)
class Optimizer:
    """What turns gradients into steps. Its state covers the adapters only."""

    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "sgd",
        "adafactor",
    ] = field(
        default="adamw_torch",
        metadata=knob(
            "optimizer, by its name in transformers",
            "state a trained parameter: AdamW two values, 8-bit about 2 bytes, paged may move to the host, sgd none",
        ),
    )
    optimizer_state_dtype: Literal["auto", "bf16", "fp32"] = field(
        default="auto",
        metadata=knob(
            "dtype of the two values that adamw_torch keeps for each trained weight; auto is the adapters'",
            "fp32 doubles the state of bf16 adapters and makes it exact; bf16 halves that of fp32 ones",
        ),
    )
    gradient_release: bool = field(
        default=False,
        metadata=knob(
            "step each trained weight within backward and free its gradient at once; needs adamw_torch, "
            "gradient_accumulation_steps 1 and max_grad_norm 0",
            "the gradients of all adapters never exist together",
        ),
    )
    learning_rate: float = field(default=2e-4, metadata=knob("peak learning rate", "none", above=0, max=1))
    weight_decay: float = field(default=0.0, metadata=knob("decoupled weight decay", "none", min=0, max=1))
    max_grad_norm: float = field(
        default=1.0,
        metadata=knob("clip the gradients' norm to this; 0 does not clip", "none to speak of", min=0, max=1e9),
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = field(
        default="linear", metadata=knob("course of the learning rate", "none")
    )
    warmup_steps: int = field(
        default=0, metadata=knob("optimizer steps until the peak learning rate", "none", min=0, max=2**31 - 1)
    )


@dataclass(frozen=True)
class Schedule:
    """How long, and what is written on the way."""

    max_steps: int | None = field(
        default=None,
        metadata=knob(
            "optimizer steps; null trains num_epochs instead",
            "none: the peak is reached by the second step",
            min=1,
            max=2**31 - 1,
        ),
    )
    num_epochs: float = field(
        default=1.0, metadata=knob("passes over the data, where max_steps is null", "none", above=0, max=1_000_000)
    )
    seed: int = field(default=42, metadata=knob("seed of weights, order and dropout", "none", min=0, max=2**32 - 1))
    logging_steps: int = field(
        default=1, metadata=knob("optimizer steps between two logged losses", "none", min=1, max=2**31 - 1)
    )
    save_steps: int = field(
        default=50,
        metadata=knob("optimizer steps between two checkpoints", "none on the GPU; disk only", min=1, max=2**31 - 1),
    )
    save_total_limit: int = field(
        default=2, metadata=knob("checkpoints kept", "none on the GPU; disk only", min=1, max=1_000_000)
    )
    eval_steps: int | None = field(
        default=None,
        metadata=knob(
            "optimizer steps between two evaluations, where eval_fraction holds samples out; null evaluates at the end",
            "none: an evaluation takes less than a step",
            min=1,
            max=2**31 - 1,
        ),
    )


@dataclass(frozen=True)
class Dataloader:
    """How samples reach the GPU."""

    dataloader_workers: int = field(
        default=0,
        metadata=knob("processes that load data; 0 loads in the trainer's own", "host memory only", min=0, max=256),
    )
    pin_memory: bool = field(
        default=False,
        metadata=knob("page-locked host buffers for faster copies", "host memory that cannot be swapped"),
    )


@dataclass(frozen=True)
class Data:
    """What is learned."""

    data: str = field(
        default=SYNTHETIC,
        metadata=knob(
            "a .jsonl or .parquet file (messages, prompt/completion or text), relative to the recipe's folder; a data "
            "set of the hub: owner/name, or owner/name:split; or synthetic",
            "synthetic samples are all exactly max_seq_length tokens: the worst case",
            kind="data",
        ),
    )
    train_on: Literal["all", "completions"] = field(
        default="completions",
        metadata=knob(
            "loss on all tokens, or only on the assistant's and the completions where the format has them", "none"
        ),
    )
    eval_fraction: float = field(
        default=0.0,
        metadata=knob(
            "share of the samples that is held out of training, chosen by the seed, for the evaluation loss",
            "an evaluation holds one batch, no gradients and never the full logits",
            min=0,
            below=1,
        ),
    )


@dataclass(frozen=True)
class Run:
    """Where it runs and where its results go; the same training on each device."""

    device: Literal["cuda", "virtual", "cpu"] = field(
        default="cuda",
        metadata=knob(
            "cuda: a GPU; virtual: a virtual GPU, which predicts memory; cpu: for small models",
            "cuda measures it, virtual predicts it, cpu uses no GPU memory",
        ),
    )
    card: str = field(
        default="rtx-4050-laptop-6gb",
        metadata=knob("card that the virtual device plays", "its memory is the memory there is"),
    )
    output_dir: str = field(
        default="outputs/{name}",
        metadata=knob(
            "folder of checkpoints and adapter, below the working directory unless it is given on the command line; "
            "{name} is the recipe's name",
            "none on the GPU; disk only",
            kind="path",
        ),
    )
    resume: bool = field(
        default=True, metadata=knob("go on from the last checkpoint in output_dir, if there is one", "none")
    )
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = field(
        default="none",
        metadata=knob(
            "logger that follows the run, beside log.jsonl in output_dir, through transformers' own integration", "none"
        ),
    )
