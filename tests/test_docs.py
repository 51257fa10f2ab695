"""The documentation holds: its commands run, its examples too, its links lead somewhere, its reference is complete."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from docs_commands import AS, NOT_RUN, TINY, blocks, commands, pages, run_as, words_of
from forked_commands import run_forked, start_server
from helpers import RECIPES, ROOT, write_script
from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands import COMMANDS
from qlora_lowmem.commands import lengths as lengths_command
from qlora_lowmem.commands import longest as longest_command
from qlora_lowmem.commands import plan as plan_command
from qlora_lowmem.commands.frame import main, run_command
from qlora_lowmem.memory.profile import LiveMemory, write_live
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.recipe.io import load_recipe

TYPED = commands()
RUN = sorted({run_as(command) for command in TYPED if command not in NOT_RUN})
# Those that try recipes, each on a server of its own whose imports take longer than all that it tries.
TRYING = {"plan": plan_command, "longest": longest_command, "lengths": lengths_command}
TRIED_HERE = [command for command in RUN if (words_of(command) or ("", []))[0] in TRYING]
LANGUAGES = {"sh", "python", "text", "yaml", "json"}

SCRIPT = """
import torch
torch.nn.Linear(64, 64).cuda()(torch.zeros(8, 64, device="cuda")).sum().backward()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_hybrid: Path) -> Path:
    """A copy of what a person has after cloning, with a script, data, a job and a small model of their own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("bench", "tests", "results", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "reference"))
    for name in ("conftest.py", "pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": f"word {n} and more words"}) + "\n" for n in range(8)))
    own = shutil.copytree(tiny_hybrid, folder / "tiny-model")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(own / "tokenizer.json"))
    (own / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"})
    )
    small = {"model": str(own), "max_seq_length": 32, "max_steps": 2, "gradient_accumulation_steps": 1}
    (folder / TINY).write_text(load_recipe(RECIPES / "optimised.yaml", small).to_yaml())
    me = psutil.Process()
    (folder / "outputs" / "optimised").mkdir(parents=True)
    write_live(
        folder / "outputs" / "optimised", LiveMemory(me.pid, me.create_time() - 3600, 0.0, "optimised", "virtual")
    )
    (folder / "bin").mkdir()
    write_script(folder / "bin")
    (folder / "project").mkdir()
    example = next(block for block in blocks(ROOT / "docs" / "gate.md") if block.language == "python")
    (folder / "project" / "test_example.py").write_text("\n".join(example.lines) + "\n")
    (folder / "project" / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[str, "Future[str]"]]:
    """What each command said, two at a time; those that no selected test asks for are not run."""
    wanted = {item.callspec.params["command"] for item in request.session.items if _runs_a_command(item)}
    start_server()
    with ThreadPoolExecutor(2) as pool:
        yield {command: pool.submit(run, command, folder) for command in RUN if command in wanted}


def _runs_a_command(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.originalname == test_a_command_of_the_pages_runs.__name__


def run(command: str, folder: Path) -> str:
    """Run a command with this Python's programs first; the end of what it says where it fails.

    Where it trains in its own process, that is the fork of one that has imported what it needs.
    """
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    name, words = words_of(command) or ("", [])
    if name == "train" and "virtual" not in words:
        module, *arguments = _as_module(command)
        done = run_forked(module, tuple(arguments), env, timeout=300, folder=folder)
    else:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
        )
    return "" if done.returncode == 0 else f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"


def _as_module(command: str) -> list[str]:
    """The module that `python -m` runs, and its arguments."""
    program, *words = shlex.split(command)
    return ["qlora_lowmem", *words] if program == "qlora-lowmem" else words[1:]


@pytest.mark.parametrize("command", [command for command in RUN if command not in TRIED_HERE], ids=str)
def test_a_command_of_the_pages_runs(command: str, runs: dict[str, "Future[str]"]) -> None:
    failure = runs[command].result()
    assert not failure, f"{_pages_with(command)}: {failure}"


@pytest.fixture(scope="module")
def tries(built: None) -> Iterator[virtual_gpu.Server]:
    """A server of theirs: its jobs find relative paths from where it was first asked, as those of a command do."""
    del built
    with recipe_server(max_workers=2) as server:
        yield server


@pytest.mark.parametrize("command", TRIED_HERE, ids=str)
def test_a_command_that_tries_recipes_runs(
    command: str,
    folder: Path,
    tries: virtual_gpu.Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, on a server that they share."""
    for module in TRYING.values():
        monkeypatch.setattr(module, "recipe_server", lambda *_: nullcontext(tries))
    monkeypatch.chdir(folder)
    name, words = words_of(command) or ("", [])
    code = main([name, *words]) if command.startswith("qlora-lowmem") else run_command(name, words)
    assert code == 0, f"{_pages_with(command)}: {capfd.readouterr()}"


def _pages_with(command: str) -> list[str]:
    return [page for said, page in TYPED.items() if run_as(said) == command]


def test_the_lists_name_no_command_that_no_page_has() -> None:
    assert not (NOT_RUN.keys() | AS.keys()) - TYPED.keys()
    assert not NOT_RUN.keys() & AS.keys()


def test_a_reason_that_names_a_test_names_one_that_is_there() -> None:
    for reason in NOT_RUN.values():
        for path in re.findall(r"(?:tests|docs)/[\w/]+\.\w+", reason):
            assert (ROOT / path).is_file(), reason


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_blocks_name_their_language_and_python_parses(page: Path) -> None:
    for block in blocks(page):
        if block.language.startswith("{"):
            continue  # a directive of the site's generator
        assert block.language in LANGUAGES, f"line {block.line}: say sh for commands, text for output"
        if block.language == "python":
            ast.parse("\n".join(block.lines))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """The site's build checks more, but neither README nor CONTRIBUTING on their own."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("reference/"):  # made by the build
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_field(reference: ModuleType) -> None:
    page = reference.recipe_page()
    for spec in field_specs().values():
        entry = page.split(f"\n### {spec.name}\n")[1].split("\n#")[0]
        assert f"Flag: `{spec.flag}`" in entry
        assert re.sub(r"\W", "", spec.memory) in re.sub(r"\W", "", entry)
    assert "- Default: `8`\n- Allowed: an integer at least 1 and at most 4096\n- Flag: `--lora-r`" in page
    for name, default in (("warmup_steps", "0"), ("max_grad_norm", "1.0"), ("packing", "false"), ("name", "(none)")):
        assert f"- Default: `{default}`" in page.split(f"\n### {name}\n")[1].split("\n#")[0]
    assert "- Default: `null`\n- Allowed: an integer at least 1 and at most 2147483647, or null" in page


def test_other_pages_of_the_reference(reference: ModuleType) -> None:
    assert "| `weights_4bit` | base weights, 4-bit | yes |" in reference.kinds_page()
    assert "| `slack` | allocator slack (reserved, not allocated) | no |" in reference.kinds_page()
    assert "| `granite-4.0-h-1b` | `ibm-granite/granite-4.0-h-1b` | 1,536 | 40 | 100,352 |" in reference.models_page()
    assert "### rtx-4050-laptop-6gb\n\nNVIDIA GeForce RTX 4050 Laptop GPU" in reference.cards_page()
    assert "| `x.sum().item()` | `0.0` |" in reference.values_page()


def test_the_reference_has_the_help_of_every_command(reference: ModuleType) -> None:
    page = reference.commands_page()
    for name, (module, _) in COMMANDS.items():
        entry = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"Also `python -m {module}`" in entry
        assert f"usage: qlora-lowmem {name} " in entry
        assert "--help" in entry
        assert "--lora-r" not in entry
        takes_recipe = name in ("plan", "train", "explain", "longest", "lengths", "phases")
        assert ("--FIELD VALUE" in entry) == takes_recipe


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_modules_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"python3? -m (qlora_lowmem[\w.]*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(name.rstrip(".")) is not None, name
    for name in re.findall(r"qlora-lowmem ([a-z][\w-]*)", page.read_text(encoding="utf-8")):
        assert name in COMMANDS, name
