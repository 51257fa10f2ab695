"""Training data: what a file holds, and files of other kinds written as JSON Lines that `train --data` reads.

    qlora-lowmem data check my.jsonl
    qlora-lowmem data convert alpaca.json my.jsonl
    qlora-lowmem data convert answers.csv my.jsonl --prompt question --completion answer
    qlora-lowmem data convert preferences.jsonl my.jsonl --messages chosen

`check` reads every sample and says what a run would say of it. `convert` takes JSON (an array of samples), CSV, TSV,
Parquet and JSON Lines; ShareGPT, Alpaca and OpenAI's files are known, other columns are named by the flags.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from qlora_lowmem.commands.frame import add_json_argument, write_json
from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.targets import check_file

_KEYS = ("messages", "prompt", "completion", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "convert"), help="what to do")
    parser.add_argument("source", metavar="FILE", help="the data: a file, for check a data set of the hub too")
    parser.add_argument("target", metavar="OUT.jsonl", nargs="?", help="of convert: the file that is written")
    for key in _KEYS:
        parser.add_argument(f"--{key}", metavar="KEY", help=f"of convert: the key or column that holds '{key}'")
    parser.add_argument("--force", action="store_true", help="of convert: replace OUT.jsonl if it is there")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    if options.action == "check":
        if options.target is not None:
            raise UsageError(f"data check: OUT.jsonl is convert's, and {options.target!r} is given; name one FILE")
        from qlora_lowmem.data import check_data

        report = check_data(options.source, "all", quiet=False).report
        print(report.line, *report.notes, sep="\n", file=sys.stderr)
        write_json(options.json, msgspec.to_builtins(report))
        return EXIT_OK
    source, target = Path(options.source), _target_of(options)
    keys = {key: getattr(options, key) for key in _KEYS if getattr(options, key) is not None}
    if keys and set(keys) not in ({"messages"}, {"text"}, {"prompt", "completion"}, {"completion"}):
        raise UsageError(
            f"--{' --'.join(keys)}: a sample has messages, text, or prompt and completion; name the keys of one"
        )
    if set(keys) == {"completion"}:
        keys = {"prompt": "prompt", **keys}
    from qlora_lowmem.data.convert import convert

    done = convert(source, target, keys)
    print(f"{target}: {done.samples:,} samples", *done.read_as, sep="\n", file=sys.stderr)
    if done.unread:
        print(f"left out: {', '.join(done.unread)}", file=sys.stderr)
    write_json(options.json, {"written": str(target), **msgspec.to_builtins(done)})
    return EXIT_OK


def _target_of(options: argparse.Namespace) -> Path:
    if options.target is None:
        raise UsageError("data convert: OUT.jsonl is missing; name the file that is to be written")
    target = Path(options.target)
    if target.suffix.lower() != ".jsonl":
        raise UsageError(f"data convert: {options.target!r} is no .jsonl file; name one")
    check_file("data convert", options.target)
    if target.exists() and not options.force:
        raise UsageError(f"data convert: {options.target!r} exists already; give another file, or --force")
    return target
