"""What a person types: one file a command, none of them with logic; `frame.py` is what they share.

A line of `COMMANDS` makes a command of a module of this folder. `start` runs one: what `qlora-lowmem` and `python -m
qlora_lowmem.NAME` call before anything else is imported.
"""

import sys

from qlora_lowmem import signals

# name: (what `python -m` takes for it too, what it answers: a line of `qlora-lowmem --help`)
COMMANDS = {
    "plan": ("qlora_lowmem.plan", "will it fit, how far does it reach, what to change: a recipe that fits"),
    "train": ("qlora_lowmem.train", "fine-tune by a recipe, on the GPU, a virtual one or the CPU"),
    "explain": ("qlora_lowmem.explain", "where every byte of a recipe's peak is"),
    "longest": ("qlora_lowmem.longest", "the longest sequence that trains on a card"),
    "lengths": ("qlora_lowmem.lengths", "memory against sequence length"),
    "phases": ("qlora_lowmem.phases", "the peak of every phase of a run's life: loading, saving, merging, too"),
    "generate": ("qlora_lowmem.generate", "what training changed: answers and held-out loss, before and after"),
    "merge": ("qlora_lowmem.merge", "merge a trained adapter into its base model"),
    "data": ("qlora_lowmem.data", "what a data file holds; files of other kinds written as JSON Lines"),
    "watch": ("qlora_lowmem.watch", "a running job's memory in the terminal"),
    "report": ("qlora_lowmem.report.page", "one HTML page of what the commands wrote"),
    "bisect": ("qlora_lowmem.gate.bisect", "which package made a recipe need more"),
    "readme": ("qlora_lowmem.report.readme", "write the README's figures, from results/"),
    "virtual-gpu": ("qlora_lowmem.virtual_gpu", "any program on a virtual GPU"),
}


def start(module: str = "__main__", name: str | None = None) -> None:
    """Run the command `name` on the process's command line, or the script, whose first word names it; then exit.

    Args:
        module: the `__name__` of the module that calls; nothing is run where it is only imported.
    """
    if module == "__main__":
        signals.take()
        from qlora_lowmem.commands import frame, streams

        streams.make_sure()
        try:
            code = frame.main() if name is None else frame.run_command(name)
        except SystemExit as ended:  # by --help, or by SIGTERM
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        code = streams.finish(code)
        signals.let_go()
        # An interrupt inside of an `exec` of a string, as dataclasses do, makes `python -m` die of SIGINT whatever code
        # it is given, handled or not (CPython's run_eval_code_obj sets a flag), until the next such `exec` begins.
        exec("")
        sys.exit(code)
