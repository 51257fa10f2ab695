"""Runs on a virtual card without the micro-batches whose memory is known."""

from typing import Any

import torch

from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.memory.recorder import Recorder
from qlora_lowmem.run.job import Job


class OverError(Exception):
    """The card holds more than it may: whatever comes, the run does not fit."""

    def __init__(self, profile: MemoryProfile) -> None:
        self.profile = profile


class Brevity:
    """Leaves out micro-batches whose memory is known, and ends a run that has taken too much.

    A micro-batch that ends with the allocator as an earlier one of its step left it has come full circle: what follows
    does again, to the byte, what came since. All of a step's micro-batches have the same shapes. Its last is always
    run: there gradients are complete and the optimizer steps. What is left out counts among a step's launches as the
    micro-batch before it: from the second on all submit the same.
    """

    def __init__(self, job: Job, recorder: Recorder, most: int | None = None) -> None:
        self._plain: Any = job.trainer.training_step
        self._recorder = recorder
        self._most = most
        self._micro_batches = int(job.trainer.args.gradient_accumulation_steps)
        self._seen = 0
        self._left_out = 0
        self._states: list[Any] = []
        self._loss: Any = None
        job.trainer.training_step = self._training_step  # type: ignore[method-assign]

    def _training_step(self, *arguments: Any, **options: Any) -> Any:
        place = self._seen % self._micro_batches
        self._seen += 1
        if place == 0:
            self._states.clear()
        if self._left_out:
            self._left_out -= 1
            self._recorder.micro_batch_again()
            return self._loss
        self._loss = self._plain(*arguments, **options)
        if self._most is not None and self._recorder.peak().device > self._most:
            raise OverError(self._recorder.profile())
        before_last = self._micro_batches - 2 - place
        if before_last > 0:
            state = _allocator_state()
            self._states.insert(0, state)
            circle = self._states.index(state, 1) if state in self._states[1:] else before_last + 1
            self._left_out = before_last // circle * circle
        return self._loss


def _allocator_state() -> Any:
    """The caching allocator's segments and the blocks in them, by address.

    Of small blocks (1 MiB at most, in segments of their own) only how many bytes there are: scalars trade places.
    """
    segments = torch.cuda.memory_snapshot(include_traces=False)
    large = [
        (each["address"], each["stream"], *((block["size"], block["state"]) for block in each["blocks"]))
        for each in segments
        if each["segment_type"] == "large"
    ]
    small = [(each["total_size"], each["allocated_size"]) for each in segments if each["segment_type"] == "small"]
    return sorted(large), [sum(sizes) for sizes in zip(*small, strict=True)]
