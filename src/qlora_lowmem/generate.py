from qlora_lowmem.commands.frame import start

start(__name__, "generate")
