"""The longest batch of the data, run once before the first step: a job that will not fit fails in its first seconds.

Forward and backward run with room held for what does not exist yet: the optimizer's state. They run twice, for the
second time meets what the first has left: the libraries' workspaces of both threads and, with gradient accumulation,
the gradients. No step is taken, gradients and totals are dropped and the random generators put back, so training does
not know of it. Where the recipe releases gradients within backward, they are released here too, and step nothing. The
allocator keeps its segments: the largest blocks are there before smaller ones can split them.
"""

from contextlib import nullcontext
from typing import Any

import pyarrow.compute as pc
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from qlora_lowmem.training.state import RunningTotals, undisturbed

# State of a trained parameter: AdamW keeps two values in its dtype, or in the one that the recipe names; in 8 bits two
# bytes with a scale for each 256, and two fp32 values where the tensor is small (bitsandbytes/optim/optimizer.py).
# Paged state is managed memory, which no allocator counts; SGD without momentum has none, and Adafactor's rows and
# columns are none to speak of.
_TWO_VALUES = ("adamw_torch", "adamw_torch_fused")
_EIGHT_BIT = 2 * (1 + 4 / 256)
_SMALLEST_IN_8_BITS = 4096


class WarmUp(TrainerCallback):
    """Runs the longest batch as training begins."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model, optimizer and checkpoint are loaded; no sample has been drawn."""
        if state.global_step >= state.max_steps:
            return
        trainer, own = self._trainer, self._trainer.own_adamw
        totals = RunningTotals.of(trainer)
        held_back = own.without_steps() if own is not None else nullcontext()
        with trainer.phase("warm-up"), undisturbed(), held_back:
            held = torch.empty(self._coming_state_bytes(), dtype=torch.uint8, device=trainer.args.device)
            for _ in range(2):
                if trainer.args.gradient_accumulation_steps == 1:
                    trainer.model_wrapped.zero_grad(set_to_none=True)
                batches, items = trainer.get_batch_samples(iter([longest_batch(trainer)]), 1, trainer.args.device)
                trainer.current_gradient_accumulation_steps = 1
                trainer.training_step(trainer.model_wrapped, batches[0], items)
            del held
            trainer.model_wrapped.zero_grad(set_to_none=True)
            totals.restore(trainer)

    def _coming_state_bytes(self) -> int:
        """What the optimizer's first step will allocate; nothing if a checkpoint has brought its state."""
        if self._trainer.optimizer.state:
            return 0
        own = self._trainer.own_adamw
        dtype = own.state_dtype if own is not None else None
        # transformers makes a member of an enumeration of the name, whose `str` is `OptimizerNames.ADAMW_TORCH`.
        name = OptimizerNames(self._trainer.args.optim).value
        return optimizer_state_bytes(self._trainer.model, name, dtype)


def optimizer_state_bytes(model: nn.Module, optimizer: str, dtype: torch.dtype | None = None) -> int:
    """Bytes of the state that `optimizer`, by its name in a recipe, keeps for the trained parameters on the device.

    Args:
        dtype: of AdamW's two values; None is each parameter's own.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer in _TWO_VALUES:
        return sum(2 * parameter.numel() * (dtype or parameter.dtype).itemsize for parameter in trained)
    if optimizer == "adamw_8bit":
        # transformers keeps the state of an embedding's weight in 32 bits (`Trainer.create_optimizer`).
        wide = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        sizes = [(each.numel(), id(each) in wide or each.numel() < _SMALLEST_IN_8_BITS) for each in trained]
        return sum(8 * size if in_32_bits else round(_EIGHT_BIT * size) for size, in_32_bits in sizes)
    return 0


def longest_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """The longest samples of the trainer's data as one micro-batch, (batch, seq) token ids and what goes with them."""
    dataset = trainer.train_dataset
    longest: list[tuple[int, int]] = []
    position = 0
    for rows in dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000):
        lengths = pc.list_value_length(rows["input_ids"]).to_pylist()
        candidates = [*longest, *zip(lengths, range(position, position + len(lengths)), strict=True)]
        longest = sorted(candidates, reverse=True)[: trainer.args.per_device_train_batch_size]
        position += len(lengths)
    batch: dict[str, torch.Tensor] = trainer.data_collator([dataset[index] for _, index in longest])
    return batch
