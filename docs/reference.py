"""The reference, made from the code: recipe fields, commands, cards, models, kinds of memory, what becomes of values.

    python docs/reference.py docs/reference

The site's build calls it (`conf.py`); nothing of what it writes is committed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import qlora_lowmem
from qlora_lowmem.commands import COMMANDS
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED
from qlora_lowmem.models.sources import architecture, known_architectures, resolve_model
from qlora_lowmem.recipe import SECTIONS
from qlora_lowmem.recipe.checks import FieldSpec, allowed, field_specs
from qlora_lowmem.units import GIB, MIB
from qlora_lowmem.virtual_gpu import all_cards

PACKAGE = Path(qlora_lowmem.__file__).parent
_WIDTH = 100
_BAR = r"\|"  # a bar inside a table's cell


def write(folder: Path) -> None:
    """Write every page into `folder`, which is made if need be; a page that did not change keeps its date."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "recipe": recipe_page(),
        "commands": commands_page(),
        "cards": cards_page(),
        "models": models_page(),
        "kinds": kinds_page(),
        "values": values_page(),
    }
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def recipe_page() -> str:
    """Every field of a recipe: what it is, type, default, allowed values, flag, effect on memory."""
    parts = [
        "# Recipe fields\n\nA recipe is a YAML file of sections; every field is also a flag of the commands that take "
        "`--config`. `null` is written as in YAML."
    ]
    for section in ["", *SECTIONS]:
        about = SECTIONS[section].__doc__ if section else "Above the sections."
        parts.append(f"## {section or 'recipe'}\n\n{_plain((about or '').splitlines()[0])}")
        parts += [_field(spec) for spec in field_specs().values() if spec.section == section]
    return "\n\n".join(parts) + "\n"


def _field(spec: FieldSpec) -> str:
    # json writes null, true and false as YAML does
    default = spec.default if isinstance(spec.default, str) else json.dumps(spec.default)
    values = allowed(spec) + (", or null" if spec.optional else "")
    return (
        f"### {spec.name}\n\n{_plain(spec.help[0].upper() + spec.help[1:])}.\n\n"
        f"- Memory: {_plain(spec.memory)}.\n"
        f"- Default: `{default or '(none)'}`\n"
        f"- Allowed: {_plain(values)}\n"
        f"- Flag: `{spec.flag}`"
    )


def commands_page() -> str:
    """`--help` of every command, and the options that the plugin gives pytest."""
    parts = [
        "# Commands\n\nWhat `--help` prints, but for the flags of the recipe's fields, which are the same everywhere: "
        "[Recipe fields](recipe.md).\n\nExit codes: 0 done, 1 a failure of ours, 2 usage, configuration or data, 3 out "
        "of GPU memory or does not fit, 130 interrupted."
    ]
    parts += [
        f"## {name}\n\nAlso `python -m {module}`.\n\n```text\n{_without_recipe(_help(name))}\n```"
        for name, (module, _) in COMMANDS.items()
    ]
    parts.append(f"## The pytest plugin\n\n```text\n{_plugin_options()}\n```")
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    return _printed("-c", "from qlora_lowmem.commands.frame import main; raise SystemExit(main())", name, "--help")


def _printed(*arguments: str) -> str:
    """What Python prints; run in an empty folder, so that no project's configuration bears on it."""
    env = os.environ | {"COLUMNS": str(_WIDTH), "PYTHONPATH": str(PACKAGE.parent), "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *arguments]
        run = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exits with {run.returncode}:\n{run.stderr}")
    return run.stdout.rstrip()


def _without_recipe(text: str) -> str:
    """A help text without the recipe's flags: one placeholder in the usage, no groups of them."""
    usage, blank, rest = text.partition("\n\n")
    words = " ".join(usage.split())
    for spec in field_specs().values():
        words = re.sub(rf" \[{spec.flag}(?: [^\[\]]*(?:\[[^\]]*\])?)?\]", "", words)
        words = words.replace(f" [{spec.flag.replace('--', '--no-', 1)}]", "")
    found = re.search(r"^recipe:$", rest, re.MULTILINE)
    if found is None:
        return text
    usage = textwrap.fill(
        words + " [--FIELD\N{NO-BREAK SPACE}VALUE ...]", _WIDTH, subsequent_indent=" " * 7, break_on_hyphens=False
    )
    usage = usage.replace("\N{NO-BREAK SPACE}", " ")
    return usage + blank + rest[: found.start()].rstrip()


def _plugin_options() -> str:
    text = _printed("-m", "pytest", "--help", "-p", "qlora_lowmem.gate.plugin")
    heading = "memory of training jobs"  # of the plugin's group of options
    options = re.search(rf"^{heading}.*\n((?:  .*\n)+)", text, re.MULTILINE)
    settings = re.findall(r"^  vram_\w+ \(.*(?:\n {4,}.*)*", text, re.MULTILINE)
    if options is None or not settings:
        raise RuntimeError(f"pytest --help has no group {heading!r}, or no settings")
    return "\n".join(["options:", options[1], "settings of the ini file:", *settings])


def cards_page() -> str:
    """The table of virtual cards, and where each figure comes from."""
    rows = (
        (
            f"[{card.name}](#{card.name})",
            f"{card.total_bytes / GIB:.2f}",
            f"{card.usable_bytes / GIB:.2f}",
            f"{card.context_bytes / MIB:.0f}",
            ".".join(map(str, card.compute_capability)),
            str(card.sm_count),
        )
        for card in all_cards()
    )
    heads = ("card", "memory GiB", "usable GiB", "context MiB", "compute capability", "multiprocessors")
    sources = (
        f"### {card.name}\n\n{card.title}\n\n"
        + "\n".join(f"- {key}: {_plain(text)}" for key, text in card.sources.items())
        for card in all_cards()
    )
    return (
        "# Virtual cards\n\n*Memory* is what CUDA reports, *usable* what a job can count on beside a desktop and the "
        "driver's own, *context* what a process takes before its first tensor.\n\n"
        f"{_table(heads, rows)}\n\n## Sources\n\n" + "\n\n".join(sources) + "\n"
    )


def models_page() -> str:
    """The architectures that ship with the package."""
    rows = []
    for name in known_architectures():
        content = architecture(name)
        sizes = (content["hidden_size"], content["num_hidden_layers"], content["vocab_size"])
        rows.append((f"`{name}`", f"`{resolve_model(name, 'random').hub_id}`", *(f"{size:,}" for size in sizes)))
    return (
        "# Known models\n\nArchitectures whose figures ship with the package: with `weights: random` they need no "
        "download. Of any other, its hub id or a folder with its `config.json`.\n\n"
        f"{_table(('name', 'on the hub', 'hidden size', 'layers', 'vocabulary'), rows)}\n"
    )


def kinds_page() -> str:
    """What attribution calls a block of memory."""
    rows = [(f"`{key}`", _plain(text), "no" if key in OUTSIDE_ALLOCATED else "yes") for key, text in KINDS.items()]
    return (
        "# Kinds of memory\n\nIn the order of the tables. The kinds that are allocated sum to the allocated peak, all "
        f"of them to what the card holds.\n\n{_table(('key', 'in tables', 'part of the allocated peak'), rows)}\n"
    )


def values_page() -> str:
    """What a program is answered on a virtual GPU where a card would have computed."""
    table = tomllib.loads((PACKAGE / "virtual_gpu" / "values.toml").read_text(encoding="utf-8"))
    values = [
        (f"`{asked}`", f"`{answer}`", _plain(": ".join([group["why"], *more])))
        for group in table["values"]
        for asked, answer, *more in group["gives"]
    ]
    facts = [tuple(map(_plain, fact)) for fact in table["facts"]]
    return (
        "# Values on a virtual GPU\n\nNothing is computed there, so a value that is read is made up. With\n\n"
        f"```python\n{table['given']}```\n\n{_table(('expression', 'gives', 'why'), values)}\n\n## Libraries\n\n"
        f"{_table(('what', 'does', 'why'), facts)}\n\n"
        "```{include} ../../results/operators.md\n:heading-offset: 1\n```\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text of the code in Markdown: what would be markup is escaped."""
    return re.sub(r"([\\*_<\[\]])", r"\\\1", text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
