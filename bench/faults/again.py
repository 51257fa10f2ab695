"""What a command that is started again goes on with, and whether it ends as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

from faults.inputs import COMMANDS, PLAN, RUN
from qlora_lowmem.run_folder.checkpoints import newest_complete

_SUMMARY = ("losses", "loss_steps", "evaluations", "steps", "tokens", "recipe_hash")
_LOGGED = ("step", "loss", "grad_norm", "learning_rate", "tokens")
_ADAPTER = "adapter_model.safetensors"
_OF_THIS_TIME = ("runs", "cached", "seconds")  # of a plan: how it came to its answer


def had(name: str, folder: Path) -> str:
    """What there is to go on with: the newest whole checkpoint, or how many answers are kept."""
    if name == "plan":
        return str(len(list(folder.glob(COMMANDS[name].keeps))))
    found = newest_complete(folder / "new").checkpoint
    return found.name if found else ""


def went_on(name: str, folder: Path, had: str, prepared: Path, code: int, said: str) -> tuple[str, list[str]]:
    """(what it had to go on with, what is not as it should be) of a start that had `had` and came to `code`."""
    if code != 0:
        return had, [f"exit code {code}: {said[-1000:]}"]
    if name == "plan":
        return f"{had} answers", _of_the_plan(_json(folder / "out.json"), _json(prepared / PLAN / "out.json"), had)
    return had or "the beginning", _of_the_training(folder, prepared / RUN, had, said)


def _of_the_plan(found: dict[str, Any], expected: dict[str, Any], kept: str) -> list[str]:
    short = []
    ((case,), (right,)) = found["cases"], expected["cases"]
    if case["cached"] != int(kept):
        short.append(f"{case['cached']} answers are taken from the cache, and {kept} were whole")
    short += [f"{key} is another" for key in right if key not in _OF_THIS_TIME and case[key] != right[key]]
    return short


def _of_the_training(folder: Path, run: Path, checkpoint: str, said: str) -> list[str]:
    found, expected = _json(folder / "out.json"), _json(run / "out.json")
    short = [f"{key} differ" for key in _SUMMARY if found[key] != expected[key]]
    if (folder / "new" / _ADAPTER).read_bytes() != (run / _ADAPTER).read_bytes():
        short.append("the adapter differs")
    if _logged(folder / "new") != _logged(run):
        short.append("the log differs")
    if checkpoint and f"resuming from new/{checkpoint}\n" not in said and "has ended already" not in said:
        short.append(f"it does not go on from {checkpoint}")
    return short


def _logged(run: Path) -> list[list[Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [[json.loads(line).get(key) for key in _LOGGED] for line in lines]


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
