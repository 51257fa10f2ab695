"""What a person types: one file a command, none of them with logic; `frame.py` is what they share.

A line here makes a command of a module: `qlora-lowmem NAME`, and the module that `python -m` takes as ever.
"""

from typing import NamedTuple


class Listed(NamedTuple):
    """A command as the list knows it, which imports nothing of it.

    Attributes:
        module: `python -m MODULE` calls it too.
        line: what it answers, for `qlora-lowmem --help`.
    """

    module: str
    line: str


COMMANDS = {
    "plan": Listed("qlora_lowmem.plan", "will it fit, how far does it reach, what to change: a recipe that fits"),
    "train": Listed("qlora_lowmem.train", "fine-tune by a recipe, on the GPU, a virtual one or the CPU"),
    "explain": Listed("qlora_lowmem.explain", "where every byte of a recipe's peak is"),
    "longest": Listed("qlora_lowmem.longest", "the longest sequence that trains on a card"),
    "lengths": Listed("qlora_lowmem.lengths", "memory against sequence length"),
    "phases": Listed("qlora_lowmem.phases", "the peak of every phase of a run's life: loading, saving, merging, too"),
    "generate": Listed("qlora_lowmem.generate", "what training changed: answers and held-out loss, before and after"),
    "merge": Listed("qlora_lowmem.merge", "merge a trained adapter into its base model"),
    "watch": Listed("qlora_lowmem.watch", "a running job's memory in the terminal"),
    "report": Listed("qlora_lowmem.report.page", "one HTML page of what the commands wrote"),
    "bisect": Listed("qlora_lowmem.gate.bisect", "which package made a recipe need more"),
    "readme": Listed("qlora_lowmem.report.readme", "write the README's figures, from results/"),
    "virtual-gpu": Listed("qlora_lowmem.virtual_gpu", "any program on a virtual GPU"),
}
