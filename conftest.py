"""Registers the plugin that gives pytest --vram-gpu, --vram-card, ..., and pytest's own for tests of plugins.

An installed package registers it as an entry point of the same name; then this changes nothing. Two of its options have
short names here.
"""

import pytest

pytest_plugins = ["qlora_lowmem.gate.plugin", "pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu memory")
    group.addoption("--gpu", dest="vram_gpu", action="store_true", help="--vram-gpu, for short")
    group.addoption("--card", dest="vram_card", metavar="NAME", help="--vram-card, for short")
