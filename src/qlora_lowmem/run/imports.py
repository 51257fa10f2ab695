"""The heavy libraries, imported for a run with no more work than it needs.

A short run on a virtual card took longer to import them, and to take them apart again, than to train. Most of that is
for what such a process never does. Each measure here says why it may be left out, and each gives way: what is asked for
all the same is imported then.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions as _packages_distributions
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

    - What `_POSTPONED` names is imported for decorators, `isinstance` and rare questions: stand-ins answer these.
    - transformers and accelerate ask once whether PyTorch has `torch.distributed`, and import sharding where it has.
    - transformers asks whether there is flex attention, which no recipe can choose. Models that come later may ask.
    - bitsandbytes compiles four operators for CPUs as it is imported, and takes them as they are where that fails.
    - transformers reads the 2,300 files of its models twice, line by line: what it remembers of their folders is too
      few.
    - TRL reads what each installed distribution has brought, to know the versions of packages that it may use.
    - TRL tells Hugging Face of each trainer that is made, from a thread with a client of its own.
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    undone.callback(sys.meta_path.remove, finder)
    import torch
    import torch.distributed

    for name in _POSTPONED:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    _replace(undone, torch.distributed, "is_available", lambda: False)
    _replace(undone, importlib.metadata, "packages_distributions", _Distributions)
    import transformers.utils

    for module in (transformers.utils, transformers.utils.import_utils):
        _replace(undone, module, "is_torch_flex_attn_available", lambda: False)
    with ExitStack() as meanwhile:
        _replace(meanwhile, torch, "compile", _refuse)
        import bitsandbytes  # noqa: F401
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True


class _Nothing:
    """A class that nothing is an instance of."""


def _replace(undone: ExitStack, owner: Any, name: str, value: Any) -> None:
    undone.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _refuse(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("nothing is compiled on a virtual card")


def _none(*_arguments: Any) -> None:
    return None


def _as_it_is(function: Any = None, *_arguments: Any, **_options: Any) -> Any:
    """Stands in for a decorator of the compiler's."""
    return function if function is not None else _as_it_is


class _Finder:
    """Finds the modules that are postponed, or made quicker, and leaves the others to others."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, _target: Any = None) -> ModuleSpec | None:
        instead = _postpone if name in _POSTPONED else _CHANGED.get(name)
        spec = PathFinder.find_spec(name, path) if instead is not None else None
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = partial(_execute, instead, loader)
        return spec


def _execute(instead: Any, loader: Any, module: ModuleType) -> None:
    del loader.exec_module  # the class's own is there again
    instead(module)


class _Postponed(ModuleType):
    """A module that is not executed before more is asked of it than stands in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "config" and hasattr(self, "__path__"):  # a module that needs no other
            return importlib.import_module(f"{self.__name__}.config")
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        for each, value in _POSTPONED[self.__name__].items():
            if self.__dict__.get(each) is value:
                del self.__dict__[each]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone(module: ModuleType) -> None:
    module.__class__ = _Postponed
    module.__dict__.update(_POSTPONED[module.__name__])


def _widen(structure: Any) -> None:
    """Let transformers remember all folders of its models, and read of a file what `__all__` is and no line before."""
    structure.__spec__.loader.exec_module(structure)
    structure.create_import_structure_from_path = cache(structure.create_import_structure_from_path.__wrapped__)
    fetch = structure.fetch__all__
    structure.fetch__all__ = lambda content: fetch(content[max(content.rfind("\n__all__"), 0) :].lstrip("\n"))


def _shorten(utils: Any) -> None:
    """Let PyTorch say where an operator is registered (`file.py:42`) without a search for the file's module."""
    utils.__spec__.loader.exec_module(utils)

    def get_source(stacklevel: int) -> str:
        frame = sys._getframe(stacklevel)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"

    utils.get_source = get_source


_CHANGED = {"transformers.utils.import_utils": _widen, "torch._library.utils": _shorten}


class _Distributions(Mapping[str, list[str]]):
    """`importlib.metadata.packages_distributions()`, read when something is asked of it, also while this stands in."""

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return _packages_distributions()

    def __getitem__(self, package: str) -> list[str]:
        return self._found[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


_POSTPONED: dict[str, dict[str, Any]] = {
    "torch._dynamo": {
        "disable": _as_it_is,
        "allow_in_graph": _as_it_is,
        "assume_constant_result": _as_it_is,
        "graph_break": _none,
        "eval_frame": SimpleNamespace(OptimizedModule=_Nothing),
    },
    # Asked whether it wrote a line of code, when the allocator's history tells where something was allocated.
    "torch._inductor": {"codecache": SimpleNamespace(PyCodeCache=SimpleNamespace(stack_frames_for_code=_none))},
    "torch.distributed.tensor": {"DTensor": _Nothing},
    "torch.export": {},
    # Asked whether two shapes are the same, of numbers or of symbols.
    "torch.fx.experimental.symbolic_shapes": {"expect_true": bool, "sym_eq": operator.eq},
    # A loop of events that huggingface_hub's client can run in, if it is installed.
    "trio": {},
}
