"""The sections of a recipe: frozen dataclasses whose field metadata is the reference of every knob.

A field's leaf name is unique over all sections, so it is also its flag: `max_seq_length` is `--max-seq-length`.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_lowmem.units import parse_memory_limit

SYNTHETIC = "synthetic"
# Fields of `data` that synthetic samples have no use for.
OF_SAMPLES = ("data", "train_on", "template", "eval_fraction", "eval_data")
DATA_SUFFIXES = (".jsonl", ".parquet")
# Names of files that are no data set's: `data/train.csv` is a wrong file, not an owner and a name.
_FILES = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|gz|bz2|zst|zip|tar|arrow|xlsx?|ya?ml|py|pkl|pt)$", re.IGNORECASE)
_HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[A-Za-z0-9][\w.\[\]%+:-]*)?", re.ASCII)
TARGET_PRESETS = ("attention", "attention-qv", "all-linear")
_STEPS: dict[str, Any] = {"min": 1, "max": 2**31 - 1}

Kind = Literal["auto", "name", "modules", "exclusions", "names", "tokens", "words", "memory", "data", "path"]


def knob(default: Any, help: str, memory: str = "none", *, kind: Kind = "auto", **limits: float) -> Any:
    """A field of a section, with what it is, what it does to memory, and its limits as metadata.

    `kind` says how a value is checked where the annotation alone does not; `min` and `max` are allowed themselves,
    `above` and `below` are not.
    """
    return field(default=default, metadata={"help": help, "memory": memory, "kind": kind, **limits})


def is_hub_data(text: str) -> bool:
    """Whether `text` is a data set's hub id with an optional split: `owner/name`, `owner/name:split`."""
    return bool(_HUB_DATA.fullmatch(text)) and not _FILES.search(text.partition(":")[0])


@dataclass(frozen=True)
class Base:
    """The base model, which stays frozen."""

    model: str = knob(
        "ibm-granite/granite-4.0-h-1b",
        "hub id, local folder, GGUF file or name of a known architecture",
        "its 4-bit weights and its embeddings are the floor of every run",
    )
    revision: str | None = knob(None, "branch, tag or commit of the model on the hub; null is the newest")
    weights: Literal["pretrained", "random"] = knob(
        "pretrained",
        "pretrained weights, or random ones of the same shapes (a memory test needs no download)",
        "none: the same shapes take the same bytes",
    )
    attention: Literal["auto", "sdpa", "eager"] = knob(
        "auto",
        "implementation of attention; auto is sdpa where transformers has it for the model, else eager",
        "eager stores (batch, heads, seq, seq) scores for backward: quadratic in the sequence; sdpa does not",
    )
    trust_remote_code: bool = knob(False, "run the model repository's own Python code; only for authors you trust")


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are stored."""

    load_in_4bit: bool = knob(
        True,
        "store the linear layers in 4 bits (QLoRA); false keeps them in the compute dtype (LoRA)",
        "about a quarter of the bytes of bf16; embeddings and LM head stay 16-bit",
    )
    quant_type: Literal["nf4", "fp4"] = knob(
        "nf4", "code book of the 4-bit values; nf4 suits normal weights", "none: both are 4 bits"
    )
    double_quant: bool = knob(
        True, "quantise the quantisation constants too", "saves about 0.37 bit a parameter: 47 MB a billion parameters"
    )
    quant_storage: Literal["uint8", "bf16"] = knob(
        "uint8",
        "dtype that the packed 4-bit values are stored as; FSDP2 shards them over cards only as bf16",
        "none on one card: the same bytes",
    )
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto",
        "dtype of the arithmetic; auto is bf16 where the card has it, else fp16 with loss scaling",
        "fp32 doubles the activations and each dequantised weight",
    )


@dataclass(frozen=True)
class Lora:
    """The adapters, and what of the base model itself is trained beside them."""

    lora_r: int = knob(
        8,
        "rank of the adapters",
        "adapters, gradients and optimizer state grow with it; small where few layers are targeted",
        min=1,
        max=4096,
    )
    lora_alpha: int = knob(16, "scale of the adapters: alpha / r multiplies their output", min=1, max=1_000_000)
    use_rslora: bool = knob(
        False, "scale by alpha / sqrt(r) instead (rsLoRA), which keeps high ranks learning", "none: a factor"
    )
    lora_dropout: float = knob(
        0.0,
        "dropout on the adapters' input",
        "above 0, a mask and a dropped copy of each input are kept",
        min=0,
        below=1,
    )
    target_modules: str | tuple[str, ...] = knob(
        "attention",
        "adapted layers: attention (q, k, v, o), attention-qv, all-linear, a list of module names, or a regular "
        "expression of whole module paths",
        "each adapted layer keeps its input for backward, and adds its adapter's gradients and optimizer state",
        kind="modules",
    )
    exclude_modules: str | tuple[str, ...] | None = knob(
        None,
        "layers that target_modules would adapt and that get no adapter: a list of names, each with all inside it, or "
        "a regular expression of whole module paths",
        "a layer without an adapter keeps no input for one, and adds neither gradients nor optimizer state",
        kind="exclusions",
    )
    modules_to_save: tuple[str, ...] | None = knob(
        None,
        "modules of the base model that are trained whole and saved with the adapters: a list of names, such as "
        "[embed_tokens, lm_head]; tied weights stay tied, and are saved once",
        "their gradients and optimizer state, each as large as their weights: three times an embedding with AdamW",
        kind="names",
    )
    trainable_token_indices: tuple[int | str, ...] | None = knob(
        None,
        "tokens, as indices or as text, whose rows of the embedding and of the LM head are trained and no others",
        "a few rows with lean; without, PEFT copies the embedding, and makes a gradient of all of its rows",
        kind="tokens",
    )
    adapter_dtype: Literal["auto", "bf16", "fp32"] = knob(
        "auto",
        "dtype of all that is trained; auto is bf16 with bf16 arithmetic, else fp32",
        "bf16 halves the adapters, their gradients and their optimizer state",
    )


@dataclass(frozen=True)
class Batch:
    """How many tokens a step sees."""

    max_seq_length: int = knob(
        1024,
        "longest sample in tokens; longer ones are cut",
        "activations and logits grow with it: the strongest knob after checkpointing",
        min=2,
        max=2**24,
    )
    batch_size: int = knob(1, "samples a micro-step", "activations and logits grow with it", min=1, max=65536)
    gradient_accumulation_steps: int = knob(
        8,
        "micro-steps before the optimizer steps",
        "none to speak of: gradients are summed in place, so batch_size 1 with 8 of these costs as 1",
        min=1,
        max=2**20,
    )
    packing: bool = knob(
        False, "join short samples until max_seq_length is full", "every step becomes as large as the longest sample"
    )


@dataclass(frozen=True)
class Memory:
    """What trades time for memory, and the limit to stay under."""

    gradient_checkpointing: bool = knob(
        True,
        "keep only each layer's input and compute the rest again in backward (about a third more time)",
        "activations fall from all layers' insides to one layer's: the strongest knob",
    )
    loss: Literal["fused", "full"] = knob(
        "fused",
        "cross-entropy in chunks fused with the LM head, or from the full logits",
        "full holds (batch, seq, vocabulary) logits, more than once and partly in fp32; fused never does",
    )
    activation_offloading: bool = knob(
        False, "keep what backward needs in host memory", "moves activations to the host, at the speed of PCIe"
    )
    expandable_segments: bool = knob(
        False,
        "let PyTorch's caching allocator grow its segments",
        "less fragmentation: can lower reserved bytes, not allocated ones",
    )
    max_memory: str | int = knob(
        "100%",
        'cap of the GPU memory: "N%" of the card, a size such as "5.5 GiB", or bytes',
        "a real cap on PyTorch's allocator: beyond it the run fails and nothing spills to the host",
        kind="memory",
    )

    def memory_limit_bytes(self, total_bytes: int) -> int:
        """The cap in bytes on a card of `total_bytes`; a size above the card is the card."""
        return min(parse_memory_limit(self.max_memory, total_bytes), total_bytes)


@dataclass(frozen=True)
class Lean:
    """The project's own low-memory implementations: the same loss and gradients from less memory."""

    lean: bool = knob(
        False,
        "run decoder layers, LM head and loss tile by tile along the sequence; exact, plain PyTorch",
        "a layer's working set is one tile's, whatever the sequence",
    )
    tile_length: int | None = knob(
        None,
        "tokens of a tile of a decoder layer; null is 512 up to 4,096 tokens, then an eighth, 2,048 at most",
        "activations of one layer grow with it; small tiles cost more launches",
        min=16,
        max=2**24,
    )
    scan_chunk_length: int = knob(
        64,
        "tokens of a chunk of the Mamba-2 scan; the result does not depend on it",
        "(chunk, chunk) matrices per head inside a tile",
        min=8,
        max=2**24,
    )
    scan: Literal["auto", "plain", "triton"] = knob(
        "auto",
        "the Mamba-2 scan in plain PyTorch or by Triton kernels; auto takes Triton where it is installed and works",
        "next to none: both make a few chunks again at a time in backward",
    )
    checkpoints: Literal["layer", "segments", "host"] = knob(
        "segments",
        "which layer inputs are kept for backward: all, about sqrt(layers) of them, or all in host memory",
        "(batch, seq, hidden) for each that is kept; host keeps none on the GPU and states what it takes of RAM",
    )
    loss_tile_bytes: int = knob(
        64 * 2**20, "bytes of the logits that exist at a time", "the LM head's working set", min=2**20, max=2**40
    )
    dequantised_tile_bytes: int = knob(
        16 * 2**20,
        "bytes of a 4-bit layer's weight that exist dequantised at a time",
        "else the largest layer's whole weight in the compute dtype: 48 MiB in Llama-3.2-3B, 112 MiB in an 8B",
        min=2**20,
        max=2**40,
    )
    quantised_embeddings: Literal["none", "8bit", "4bit"] = knob(
        "none",
        "store the tied embeddings and LM head in 8 or 4 bits; changes the model a little",
        "8bit halves them, 4bit quarters them: a third of the floor of a small model",
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
    ] = knob(
        "adamw_torch",
        "optimizer, by its name in transformers",
        "state a trained parameter: AdamW two values, 8-bit about 2 bytes, paged may move to the host, sgd none",
    )
    optimizer_state_dtype: Literal["auto", "bf16", "fp32"] = knob(
        "auto",
        "dtype of the two values that adamw_torch keeps for each trained weight; auto is the adapters'",
        "fp32 doubles the state of bf16 adapters and makes it exact; bf16 halves that of fp32 ones",
    )
    gradient_release: bool = knob(
        False,
        "step each trained weight within backward and free its gradient at once; needs adamw_torch, "
        "gradient_accumulation_steps 1 and max_grad_norm 0",
        "the gradients of all adapters never exist together",
    )
    learning_rate: float = knob(2e-4, "peak learning rate", above=0, max=1)
    weight_decay: float = knob(0.0, "decoupled weight decay", min=0, max=1)
    max_grad_norm: float = knob(
        1.0, "clip the gradients' norm to this; 0 does not clip", "none to speak of", min=0, max=1e9
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = knob(
        "linear", "course of the learning rate"
    )
    warmup_steps: int = knob(0, "optimizer steps until the peak learning rate", min=0, max=2**31 - 1)
    warmup_ratio: float = knob(
        0.0, "the same as a share of the run's optimizer steps, rounded up; 0 leaves it to warmup_steps", min=0, below=1
    )


@dataclass(frozen=True)
class Schedule:
    """How long, and what is written on the way."""

    max_steps: int | None = knob(
        None,
        "optimizer steps; null trains num_epochs instead",
        "none: the peak is reached by the second step",
        **_STEPS,
    )
    num_epochs: float = knob(1.0, "passes over the data, where max_steps is null", above=0, max=1_000_000)
    seed: int = knob(42, "seed of weights, order and dropout", min=0, max=2**32 - 1)
    logging_steps: int = knob(1, "optimizer steps between two logged losses", **_STEPS)
    save_steps: int = knob(50, "optimizer steps between two checkpoints", "none on the GPU; disk only", **_STEPS)
    save_total_limit: int = knob(2, "checkpoints kept", "none on the GPU; disk only", min=1, max=1_000_000)
    eval_steps: int | None = knob(
        None,
        "optimizer steps between two evaluations, where eval_fraction or eval_data has samples for them; null "
        "evaluates at the end",
        "none: an evaluation takes less than a step",
        **_STEPS,
    )


@dataclass(frozen=True)
class Dataloader:
    """How samples reach the GPU."""

    dataloader_workers: int = knob(
        0, "processes that load data; 0 loads in the trainer's own", "host memory only", min=0, max=256
    )
    pin_memory: bool = knob(False, "page-locked host buffers for faster copies", "host memory that cannot be swapped")


@dataclass(frozen=True)
class Data:
    """What is learned."""

    data: str = knob(
        SYNTHETIC,
        "a .jsonl or .parquet file (messages, prompt/completion or text), relative to the recipe's folder; a data "
        "set of the hub: owner/name, or owner/name:split; or synthetic",
        "synthetic samples are all exactly max_seq_length tokens: the worst case",
        kind="data",
    )
    train_on: Literal["all", "completions"] = knob(
        "completions", "loss on all tokens, or only on the assistant's and the completions where the format has them"
    )
    template: Literal["auto", "none"] = knob(
        "auto",
        "how a pair of two texts is put: auto makes a turn of the user and one of the assistant of it where the model "
        "has a chat template; none joins the texts as they are",
        "none beyond the template's own tokens",
    )
    eval_fraction: float = knob(
        0.0,
        "share of the samples that is held out of training, chosen by the seed, for the evaluation loss",
        "an evaluation holds one batch, no gradients and never the full logits",
        min=0,
        below=1,
    )
    eval_data: str | None = knob(
        None,
        "data of the same kinds for the evaluation loss, instead of a share held out; beside synthetic data, none",
        "an evaluation holds one batch, no gradients and never the full logits",
        kind="data",
    )
    added_tokens: tuple[str, ...] | None = knob(
        None,
        "texts that become a token each, such as [<|step|>]; their rows are trained, alone or with the modules_to_save",
        "as trainable_token_indices; the embedding grows by a row each where the model has none to spare",
        kind="words",
    )
    neftune_noise_alpha: float = knob(
        0.0,
        "noise on the embedded samples while training (NEFTune): uniform within alpha / sqrt(tokens x hidden size) of "
        "each value; 0 adds none",
        "one (batch, seq, hidden) tensor for a moment",
        min=0,
        max=1000,
    )


@dataclass(frozen=True)
class Run:
    """Where it runs and where its results go; the same training on each device."""

    device: Literal["cuda", "virtual", "cpu"] = knob(
        "cuda",
        "cuda: a GPU; virtual: a virtual GPU, which predicts memory; cpu: for small models",
        "cuda measures it, virtual predicts it, cpu uses no GPU memory",
    )
    card: str = knob("rtx-4050-laptop-6gb", "card that the virtual device plays", "its memory is the memory there is")
    output_dir: str = knob(
        "outputs/{name}",
        "folder of checkpoints and adapter, below the working directory unless it is given on the command line; "
        "{name} is the recipe's name",
        "none on the GPU; disk only",
        kind="path",
    )
    resume: bool = knob(True, "go on from the last checkpoint in output_dir, if there is one")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = knob(
        "none", "logger that follows the run, beside log.jsonl in output_dir, through transformers' own integration"
    )
