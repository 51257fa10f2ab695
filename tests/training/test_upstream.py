"""What of transformers' and TRL's trainers is private and yet overridden or used here, all of it in three tables.

A private method may change with any version. Where its parameters, or what calls it, are not what the override was
written for, a test fails and names it: read the method again, mend the override, then write the new facts into the
table and the new bounds of the two packages into pyproject.toml.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
import trl
from trl import SFTTrainer

from qlora_lowmem import run, run_folder, training

ROOMS = (training, run, run_folder)


class Method(NamedTuple):
    """A private method as transformers or TRL has it.

    Attributes:
        owner: the class whose method it is.
        parameters: names and defaults.
        users: the methods that call it or pass it on.
    """

    owner: str
    parameters: str
    users: set[str]


OVERRIDDEN = {
    "_get_grad_norm": Method("Trainer", "self, model, grad_norm=None", {"Trainer._run_epoch"}),
    "_get_train_sampler": Method("Trainer", "self, train_dataset=None", {"Trainer.get_train_dataloader"}),
    "_run_epoch": Method(
        "Trainer",
        "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        {"Trainer._inner_training_loop"},
    ),
    "_maybe_log_save_evaluate": Method(
        "Trainer",
        "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None",
        {"Trainer._run_epoch"},
    ),
    "_save_checkpoint": Method(
        "SFTTrainer",
        "self, model, trial",
        {
            "CheckpointManager.execute_jit_checkpoint",
            "SFTTrainer._save_checkpoint",
            "Trainer._maybe_log_save_evaluate",
        },
    ),
    "_get_output_dir": Method(
        "Trainer",
        "self, trial",
        {"CheckpointManager.execute_jit_checkpoint", "Trainer._finalize_training", "Trainer._save_checkpoint"},
    ),
    "_load_from_checkpoint": Method(
        "Trainer", "self, resume_from_checkpoint, model=None", {"Trainer._prepare_for_training", "Trainer.train"}
    ),
    "_load_optimizer_and_scheduler": Method("Trainer", "self, checkpoint", {"Trainer._prepare_for_training"}),
}
CALLED = {
    "_get_learning_rate": Method(
        "Trainer", "self", {"Trainer._maybe_log_save_evaluate", "Trainer._run_epoch", "Trainer.training_step"}
    ),
    "_save": Method("Trainer", "self, output_dir=None, state_dict=None", {"Trainer.save_model"}),
}
# Attributes that the trainers keep for themselves, with the methods that use them.
ATTRIBUTES = {
    "_globalstep_last_logged": {
        "Trainer._inner_training_loop",
        "Trainer._maybe_log_save_evaluate",
        "Trainer._run_epoch",
    },
    "_metrics": {"SFTTrainer.__init__", "SFTTrainer.compute_loss", "SFTTrainer.log"},
    "_total_train_tokens": {"SFTTrainer.__init__", "SFTTrainer.compute_loss"},
    "_tr_loss": {"Trainer._finalize_training", "Trainer._inner_training_loop", "Trainer._run_epoch"},
}


def _is_private(name: str) -> bool:
    of_every_abstract_class = name == "_abc_impl"
    return name.startswith("_") and not name.startswith("__") and not of_every_abstract_class


def _our_classes() -> Iterator[type]:
    for room in ROOMS:
        for found in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
            values = vars(importlib.import_module(found.name)).values()
            yield from (each for each in values if isinstance(each, type) and each.__module__ == found.name)


def overridden() -> set[str]:
    """Private methods of another package's class that a class of ours has too."""
    return {
        name
        for ours in _our_classes()
        for base in ours.__mro__[1:-1]
        for name in vars(ours)
        if _is_private(name) and name in vars(base) and not base.__module__.startswith("qlora_lowmem")
    }


def used() -> set[str]:
    """Private names of the trainers that ours uses of itself, and that any module of the rooms uses of a trainer.

    An attribute of ours whose name a trainer begins to use is among them.
    """
    found = set()
    for room in ROOMS:
        for file in sorted(Path(room.__path__[0]).glob("*.py")):
            of_itself = ("self", "super()") if file.name == "trainer.py" else ()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and _is_private(node.attr):
                    of = ast.unparse(node.value)
                    if of in of_itself or of.endswith("trainer"):
                        found.add(node.attr)
    return {name for name in found if hasattr(SFTTrainer, name) or users_of(name)}


@functools.cache
def upstream() -> dict[str, ast.AST]:
    """Every method of the trainers, and of the classes beside them that are given a trainer: by `Class.method`."""
    theirs, trls = (Path(str(package.__file__)).parent for package in (transformers, trl))
    files = [
        *sorted(theirs.glob("trainer*.py")),
        *(trls / "trainer" / f"{name}_trainer.py" for name in ("sft", "base")),
    ]
    return {
        f"{top.name}.{method.name}": method
        for file in files
        for top in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(top, ast.ClassDef)
        for method in top.body
        if isinstance(method, ast.FunctionDef)
    }


def users_of(name: str) -> set[str]:
    """The methods that use an attribute of that name."""
    return {
        place
        for place, body in upstream().items()
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute) and node.attr == name
    }


def as_installed(name: str) -> Method:
    """The facts of a method in the versions installed."""
    owner = next(base for base in SFTTrainer.__mro__ if name in vars(base))
    signature = inspect.signature(getattr(owner, name))
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    parameters = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1]
    return Method(owner.__name__, parameters, users_of(name))


def test_the_tables_name_all_that_is_overridden_or_used() -> None:
    assert overridden() == set(OVERRIDDEN)
    assert used() - set(OVERRIDDEN) == {*CALLED, *ATTRIBUTES}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_a_private_method_is_what_it_was(name: str) -> None:
    assert hasattr(SFTTrainer, name), f"{name} is gone from the trainers of transformers and TRL"
    assert as_installed(name) == (OVERRIDDEN | CALLED)[name], f"{name} has changed: read it again"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_private_attribute_is_used_where_it_was(name: str) -> None:
    assert users_of(name) == ATTRIBUTES[name], f"{name} is used elsewhere: read the trainers again"


def test_a_change_upstream_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: object, model: object, grad_norm: object, norm_type: int = 2) -> None:
        """One parameter more."""

    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", changed)
    assert as_installed("_get_grad_norm") != OVERRIDDEN["_get_grad_norm"]
    body = ast.parse("def _run_epoch(self): self._get_output_dir(None)").body[0]
    monkeypatch.setitem(upstream(), "Trainer._run_epoch", body)
    assert users_of("_get_output_dir") == OVERRIDDEN["_get_output_dir"].users | {"Trainer._run_epoch"}
    assert users_of("_get_grad_norm") == set()
