"""An independent witness of a training step's memory: a ledger over tensors that have shapes and no memory.

It knows nothing of the virtual GPU: no CUDA library is called, real or stubbed, no allocator counts, and the machine
needs no CUDA build of torch. What it shares with the virtual GPU is what both are about: the real model classes,
PEFT, bitsandbytes, TRL's loss, autograd, checkpointing and autocast.
"""
