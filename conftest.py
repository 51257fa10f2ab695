"""Registers the plugin that gives pytest --gpu, --card and --vram-cap."""

pytest_plugins = ["qlora_lowmem.gate.plugin"]
