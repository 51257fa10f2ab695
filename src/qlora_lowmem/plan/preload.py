"""What a server of virtual runs has imported before it forks them: the heavy libraries, with no more than a run needs,
what a run would import or work out by itself each time, and the worker.
"""

from qlora_lowmem.run.imports import heavy_imports

with heavy_imports():
    import datasets  # noqa: F401
    import peft.tuners.lora.bnb
    import peft.utils.transformers_weight_conversion  # noqa: F401
    import transformers.integrations.bitsandbytes  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import qlora_lowmem.plan.worker  # noqa: F401

    get_checkpoint_conversion_mapping("")  # compiles the patterns of every model's names, and keeps them
