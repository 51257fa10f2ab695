"""Registers the plugin that gives pytest --gpu, --card, --record, ..., and pytest's own for tests of plugins.

An installed package registers it as an entry point of the same name; then this changes nothing.
"""

pytest_plugins = ["qlora_lowmem.gate.plugin", "pytester"]
