"""The heavy libraries, imported for a run with no more work than it needs.

A short run on a virtual card took longer to import them, and to take them apart again, than to train. Most of that is
for what such a process never does. Each measure here says why it may be left out, and each gives way: what is asked for
all the same is imported then.
"""

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import processes
from qlora_lowmem.signals import importing


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the first import of the libraries by a process that runs one thing and ends.

    Importing them makes a million objects that live as long as the process. Python's garbage collector would walk over
    them nine times while they are made, once more as training begins, and thrice as the process ends. Here it waits,
    and then takes them for permanent (`gc.freeze`). A signal ends the process at once, with nothing undone.
    """
    with ExitStack() as undone:
        undone.enter_context(importing())
        gc.disable()
        undone.callback(gc.enable)
        undone.callback(gc.freeze)
        if virtual_gpu.current_card() is not None and processes() == 1 and "transformers" not in sys.modules:
            _leave_out_what_no_trial_needs(undone)
        yield


def _leave_out_what_no_trial_needs(undone: ExitStack) -> None:
    """A process on a virtual card trains alone, and compiles nothing: its kernels do nothing.

    - `torch._dynamo` and `torch.distributed.tensor` are imported for decorators and for `isinstance` (by transformers,
      accelerate, TRL and PyTorch's own checkpointing): stand-ins answer these.
    - transformers and accelerate ask once whether PyTorch has `torch.distributed`, and import sharding where it has.
    - transformers asks whether there is flex attention, which no recipe can choose. Models that come later may ask.
    - bitsandbytes compiles four operators for CPUs as it is imported, and takes them as they are where that fails.
    - transformers reads the 2,300 files of its models twice: what it remembers of their folders is too few.
    """
    finder = _Remembering()
    sys.meta_path.insert(0, finder)
    undone.callback(sys.meta_path.remove, finder)
    import torch
    import torch.distributed

    _postpone(
        "torch._dynamo",
        disable=_as_it_is,
        allow_in_graph=_as_it_is,
        assume_constant_result=_as_it_is,
        graph_break=lambda *_: None,
        eval_frame=SimpleNamespace(OptimizedModule=_Nothing),
    )
    _postpone("torch.distributed.tensor", DTensor=_Nothing)
    _replace(undone, torch.distributed, "is_available", lambda: False)
    import transformers.utils

    for module in (transformers.utils, transformers.utils.import_utils):
        _replace(undone, module, "is_torch_flex_attn_available", lambda: False)
    with ExitStack() as meanwhile:
        _replace(meanwhile, torch, "compile", _refuse)
        import bitsandbytes  # noqa: F401


class _Nothing:
    """A class that nothing is an instance of."""


def _replace(undone: ExitStack, owner: Any, name: str, value: Any) -> None:
    undone.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _refuse(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("nothing is compiled on a virtual card")


def _as_it_is(function: Any = None, *_arguments: Any, **_options: Any) -> Any:
    """Stands in for a decorator of the compiler's."""
    return function if function is not None else _as_it_is


class _Remembering:
    """Finds transformers' module that reads the folders of its models, and lets it remember all of them."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(name, path)
        loader: Any = spec.loader if spec is not None else None
        execute = loader.exec_module

        def execute_and_widen(module: Any) -> None:
            execute(module)
            module.create_import_structure_from_path = cache(module.create_import_structure_from_path.__wrapped__)

        loader.exec_module = execute_and_widen
        return spec


class _Postponed(ModuleType):
    """A package imported without its `__init__.py`, which runs when more is asked of it than stands in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "config":  # a module that needs no other
            return importlib.import_module(f"{self.__name__}.config")
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        for each in self.__dict__.pop("_stand_ins"):
            del self.__dict__[each]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone(name: str, **stand_ins: Any) -> None:
    """Put a postponed package in the place of one that is not imported yet."""
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Postponed
    package.__dict__.update(stand_ins, _stand_ins=tuple(stand_ins))
    sys.modules[name] = package
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, package)
