"""Registers the plugin that gives pytest --vram-gpu, --vram-card, ..., and pytest's own for tests of plugins.

An installed package registers it as an entry point of the same name; then this changes nothing. Two of its options have
short names here.
"""

import signal

import pytest

# A shell starts what it puts into the background with interrupts ignored, and so would be every program that a test
# starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["qlora_lowmem.gate.plugin", "pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu memory")
    group.addoption("--gpu", dest="vram_gpu", action="store_true", help="--vram-gpu, for short")
    group.addoption("--card", dest="vram_card", metavar="NAME", help="--vram-card, for short")
