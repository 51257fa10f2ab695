"""Runs at the start of every Python process on a virtual GPU: arranges the hooks, and imports nothing for them.

An interrupt while this runs ends the process, as one does before Python listens, and is no traceback of this file.
"""

# ruff: noqa: E402 - the other imports come after what an interrupt of them needs
import _signal  # type: ignore[import-not-found]  # `signal` costs every process its import

_LISTENS = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
if _LISTENS:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib costs every process its import


class _HookLoader:
    """Loads a module with its own loader, then hands it to the hooks."""

    def __init__(self, loader: object, waiting: set[str]) -> None:
        self._loader = loader
        self._waiting = waiting

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._waiting.discard(module.__name__)
        module.__spec__.loader = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)  # type: ignore[attr-defined]
        importlib.import_module("vgpu_hooks").HOOKS[module.__name__](module)


class _HookFinder:
    """Finds the modules that have a hook, each once, and leaves the finding to the others."""

    def __init__(self) -> None:
        self._waiting = {
            "torch",
            "torch._inductor.runtime.benchmarking",
            "torch.distributed.distributed_c10d",
            "transformers.masking_utils",
            "triton.runtime.jit",
            "triton.testing",
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._waiting:
            return None
        # Asking where a module is (transformers asks for torch) is not importing it: it waits until it is executed.
        for finder in sys.meta_path:
            found = finder.find_spec(name, path, target) if finder is not self else None
            if found is not None and found.loader is not None:
                found.loader = _HookLoader(found.loader, self._waiting)  # type: ignore[assignment]
                return found
        return None


def _shadowed_sitecustomize() -> importlib.machinery.ModuleSpec | None:
    """The sitecustomize that this one hides."""
    folders = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]  # noqa: PTH100
    return importlib.machinery.PathFinder.find_spec("sitecustomize", folders)


def _run(spec: importlib.machinery.ModuleSpec | None) -> None:
    """Runs it, as Python would have without us."""
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("VGPU_ACCOUNT"):
    sys.meta_path.insert(0, _HookFinder())
_hidden = _shadowed_sitecustomize()
if _LISTENS:
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
_run(_hidden)
