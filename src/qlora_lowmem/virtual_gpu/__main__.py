from qlora_lowmem.commands import start

start(__name__, "virtual-gpu")
