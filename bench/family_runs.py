"""One family trained for two steps by the product's own code, in a fork of a server of virtual runs; and the table."""

import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from matrix_recipes import RECIPES
from qlora_lowmem.errors import QloraLowmemError
from qlora_lowmem.models.targets import attends
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.results.tables import Cell, Column, markdown_of, write_rows
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.job import Job
from qlora_lowmem.run.preflight import inputs_of

TOKENS = 48
_NO_CHECKPOINTS = "memory.gradient_checkpointing"


@dataclass(frozen=True)
class Family:
    """What became of a family.

    Attributes:
        size: `tiny`, or `default`: its configuration class's own sizes.
        device: where its steps ran: `virtual`, or `cpu` where they do not on a card.
        trains, trains_lean: whether two steps ended, by the recipe `optimised` and by `lean`, on all linear layers.
        attention: what was chosen; empty where it has none.
        checkpointing: whether transformers has gradient checkpointing for it.
        ideas: those of lean that it takes, by name.
        adapted, idle: modules with adapters, and those of them whose adapters got no gradient.
        allocated_bytes: the plain run's peak; 0 of a tiny one.
        reason: why not, or why not on a card, in one line.
    """

    family: str
    size: str
    device: str
    trains: bool
    trains_lean: bool
    attention: str
    checkpointing: bool
    ideas: str
    adapted: int
    idle: int
    allocated_bytes: int
    reason: str


def recipe_of(folder: Path, name: str, device: str = "virtual") -> Recipe:
    """The recipe `name` of `bench/recipes` on a model's folder, on all linear layers."""
    changes = {"model": str(folder), "target_modules": "all-linear", "max_seq_length": TOKENS, "device": device}
    return load_recipe(RECIPES / f"{name}.yaml", changes | {"gradient_accumulation_steps": 1})


def run_here(config: dict[str, Any], name: str, device: str = "virtual") -> dict[str, Any]:
    """Two steps of the recipe `name`: a `reason`, or what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        recipe = recipe_of(Path(folder), name, device)
        try:
            return _steps(recipe)
        except QloraLowmemError as error:
            if _NO_CHECKPOINTS not in str(error):
                return {"reason": _clean(str(error), folder)}
        except Exception as error:  # whatever a family's code raises is its row
            return {"reason": f"{_where(error)}: {_clean(str(error), folder)}"}
        try:
            return _steps(replace_field(recipe, "gradient_checkpointing", False)) | {"checkpointing": False}
        except Exception as error:
            return {"reason": f"{_where(error)}: {_clean(str(error), folder)}", "checkpointing": False}


def _steps(recipe: Recipe) -> dict[str, Any]:
    watch = _Gradients()

    def ready(job: Job, _recorder: Any) -> None:
        watch.model = job.model

    with tempfile.TemporaryDirectory() as folder:
        done = execute(inputs_of(recipe), output_dir=Path(folder), save=False, callbacks=[watch], on_ready=ready)
    assert watch.model is not None
    base = watch.model.get_base_model()
    return {
        "attention": base.config._attn_implementation if attends(base) else "",
        "checkpointing": True,
        "ideas": list(done.lean.applied) if done.lean is not None else [],
        "adapted": done.adapted_modules,
        "idle": len(watch.modules - watch.learning),
        "allocated": done.profile.peak.allocated if done.profile is not None else 0,
    }


class _Gradients(TrainerCallback):
    """Which adapted modules get a gradient in some step."""

    def __init__(self) -> None:
        self.model: Any = None
        self.modules: set[str] = set()
        self.learning: set[str] = set()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called when a step's gradients are complete."""
        for name, parameter in self.model.named_parameters():
            module = name.partition(".lora_")[0]
            if parameter.requires_grad:
                self.modules.add(module)
            if parameter.grad is not None:
                self.learning.add(module)


def _where(error: Exception) -> str:
    """The exception's type, and the last line of another package that it came by."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" in frame.filename]
    own = [frame for frame in frames if "torch" not in Path(frame.filename).parts] or frames
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{place}"


def _clean(text: str, folder: str) -> str:
    return " ".join(text.split())[:240].replace(folder, "its folder")


_COLUMNS: tuple[Column[Family], ...] = (
    Column("family", lambda row: Cell(row.family)),
    Column("trains", lambda row: Cell(_yes(row.trains, row))),
    Column("with lean", lambda row: Cell(_yes(row.trains_lean, row))),
    Column("attention", lambda row: Cell(row.attention or "-")),
    Column("checkpointing", lambda row: Cell("yes" if row.checkpointing else "no")),
    Column("ideas of lean", lambda row: Cell(row.ideas or "-")),
    Column("adapted modules", lambda row: Cell.count(row.adapted)),
    Column("without a gradient", lambda row: Cell.count(row.idle)),
)
_DEFAULT: tuple[Column[Family], ...] = (*_COLUMNS, Column("GiB", lambda row: Cell.gib(row.allocated_bytes)))


def _plain(row: Family) -> bool:
    return row.trains


def _lean(row: Family) -> bool:
    return row.trains and row.trains_lean


def _yes(trains: bool, row: Family) -> str:
    return ("yes" if row.device == "virtual" else "on a CPU") if trains else "no"


def write_families(folder: Path, rows: Sequence[Family], left: Mapping[str, str], record: dict[str, Any]) -> None:
    """Write `families` as JSON, Markdown and CSV; `left` are the model types that are no family, with the reason."""
    tiny, default = ([row for row in rows if row.size == size] for size in ("tiny", "default"))
    on_a_card, lean = ([row for row in tiny if row.device == "virtual" and each(row)] for each in (_plain, _lean))
    on_a_cpu = sum(row.device == "cpu" for row in tiny)
    text = (
        f"Of the {len(tiny)} decoder-only families that transformers {record['versions']['transformers']} has as a "
        f"causal language model, {len(on_a_card)} train on a virtual card ({len(on_a_card) / len(tiny):.1%}), "
        f"{len(lean)} of them with lean too: two steps of the recipes `optimised` and `lean` on all linear layers, "
        f"{TOKENS} tokens, of a tiny model with random weights that has several kinds of the family's layers. "
        f"{on_a_cpu} more train on a CPU alone, in fp32; why not on a card is below. The last column counts adapted "
        "modules whose adapters got no gradient in either step."
    )
    reasons = [f"- `{row.family}`: {row.reason}" for row in rows if row.reason]
    by_reason: dict[str, list[str]] = {}
    for name, why in left.items():
        by_reason.setdefault(why, []).append(f"`{name}`")
    parts = [text, markdown_of(_COLUMNS, tiny, 6)]
    if reasons:
        parts += ["## Why not on a card", "\n".join(reasons)]
    if default:
        parts += [
            "## Those that people fine-tune, at their default size",
            "The sizes are those of the configuration class. The peak is the plain recipe's, allocated.",
            markdown_of(_DEFAULT, default, 6),
        ]
    parts += [
        "## Model types that are no such family",
        "\n".join(f"- {why}: {', '.join(n)}" for why, n in by_reason.items()),
    ]
    head = {"provenance": record["provenance"], "left_out": dict(left)}
    write_rows(folder, "families", rows, record, title="Every decoder-only family", parts=parts, head=head)
