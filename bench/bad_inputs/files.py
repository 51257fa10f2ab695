"""What a path can lead to instead of the file that is meant, for every flag that takes one."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from bad_inputs import Case, Place

Make = Callable[[Path], Path]


def _written(content: bytes) -> Make:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _linked(target: str) -> Make:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path


def _loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def _huge(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(2**36)
    return path


def _in_a_file(path: Path) -> Path:
    path.write_bytes(b"x")
    return path / path.name


# Made at a path that has the suffix which the flag wants; the path that is given instead.
PATHS: dict[str, Make] = {
    "not there": lambda path: path,
    "a folder": _folder,
    "an empty file": _written(b""),
    "a pipe that nobody writes": _pipe,
    "a device that never ends": _linked("/dev/zero"),
    "a device of nothing": _linked("/dev/null"),
    "a file that cannot be read": _linked("/proc/self/mem"),
    "a socket": _socket,
    "a link to itself": _loop,
    "a link to nothing": _linked("nowhere"),
    "a name too long": lambda path: path.with_name("x" * 300 + path.suffix),
    "a path too long": lambda path: Path("x/" * 3000, path.name),
    "a user's who is not there": lambda path: Path("~nobody9", path.name),
    "in a file": _in_a_file,
    "64 GiB of nothing": _huge,
    "bytes at random": _written(bytes(range(256)) * 40),
    "UTF-16": _written("good: yes\n".encode("utf-16")),
    "UTF-32": _written("good: yes\n".encode("utf-32")),
    "NUL bytes": _written(b"\0" * 4000),
    "100,000 brackets": _written(b"[" * 100_000),
    "100,000 braces": _written(b'{"a":' * 100_000),
    "a torn object": _written(b'{"a": {"b": '),
    "gzip": _written(b"\x1f\x8b\x08\x08\x00\x00\x00\x00\xff"),
}
_WAITED_FOR = ("a pipe that nobody writes",)
_STREAMED = ("64 GiB of nothing",)  # it is read, a line at a time, and refused at its end
# Command, flag, suffix, the words with PATH for the path, and what of PATHS it takes or refuses elsewhere.
_TAKES: list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]] = [
    ("train", "--config", ".yaml", ("--config", "PATH", "--quiet"), ()),
    ("explain", "--config", ".yaml", ("--config", "PATH"), ()),
    ("plan", "--config", ".yaml", ("--config", "PATH", "--card", "12GB"), ()),
    ("longest", "--config", ".yaml", ("--config", "PATH"), ()),
    ("lengths", "--config", ".yaml", ("--config", "PATH"), ()),
    ("phases", "--config", ".yaml", ("--config", "PATH"), ()),
    ("generate", "--config", ".yaml", ("--config", "PATH", "--prompt", "a"), ()),
    ("train", "--data", ".jsonl", ("--config", "GOOD/good.yaml", "--quiet", "--data", "PATH"), _STREAMED),
    ("train", "--data Parquet", ".parquet", ("--config", "GOOD/good.yaml", "--quiet", "--data", "PATH"), ()),
    ("train", "--eval-data", ".jsonl", ("--config", "GOOD/good.yaml", "--quiet", "--eval-data", "PATH"), _STREAMED),
    ("train", "--model GGUF", ".gguf", ("--config", "GOOD/good.yaml", "--quiet", "--model", "PATH"), ()),
    ("train", "--model", "", ("--config", "GOOD/good.yaml", "--quiet", "--model", "PATH"), ()),
    ("plan", "--model", "", ("--model", "PATH", "--card", "12GB", "--no-cache"), ()),
    ("generate", "--data", ".jsonl", ("--run", "GOOD/run", "--quiet", "--data", "PATH"), _STREAMED),
    ("generate", "--run", "", ("--run", "PATH", "--prompt", "a"), ()),
    ("merge", "--run", "", ("--run", "PATH", "--to", "NEW/x"), ()),
    ("data", "check", ".jsonl", ("check", "PATH"), _STREAMED),
    ("data", "check Parquet", ".parquet", ("check", "PATH"), ()),
    ("data", "convert JSON", ".json", ("convert", "PATH", "NEW/x.jsonl"), ()),
    ("data", "convert CSV", ".csv", ("convert", "PATH", "NEW/x.jsonl"), ()),
    ("data", "convert TSV", ".tsv", ("convert", "PATH", "NEW/x.jsonl"), ()),
    ("data", "convert Parquet", ".parquet", ("convert", "PATH", "NEW/x.jsonl"), ()),
    ("bisect", "--good", ".txt", ("--good", "PATH", "--bad", "GOOD/bad.txt", "--config", "GOOD/good.yaml"), ()),
    ("bisect", "--bad", ".txt", ("--good", "GOOD/good.txt", "--bad", "PATH", "--config", "GOOD/good.yaml"), ()),
    ("bisect", "--config", ".yaml", ("--good", "GOOD/good.txt", "--bad", "GOOD/bad.txt", "--config", "PATH"), ()),
    ("report", "results", ".json", ("PATH", "--output", "NEW/x.html"), ()),
    ("readme", "--readme", ".md", ("--results", "results", "--readme", "PATH"), ()),
    ("readme", "--results", "", ("--results", "PATH"), ()),
    ("watch", "--output-dir", "", ("--once", "--output-dir", "PATH"), ()),
]


def cases() -> Iterator[Case]:
    """Each of those paths for each of those flags, and as a file of a folder."""
    for command, flag, suffix, words, left_out in _TAKES:
        for what, make in PATHS.items():
            if what not in left_out:
                yield Case(command, f"{flag}: {what}", _with(make, suffix, words), waits=what in _WAITED_FOR)
    inside: list[tuple[str, str, tuple[str, ...]]] = [
        ("train", "config.json", ("--config", "GOOD/good.yaml", "--quiet", "--model", "FOLDER")),
        ("generate", "recipe.json", ("--run", "FOLDER", "--prompt", "a")),
        ("merge", "recipe.json", ("--run", "FOLDER", "--to", "NEW/x")),
        ("watch", "memory.json", ("--once", "--output-dir", "FOLDER")),
        ("report", "gate.json", ("FOLDER", "--output", "NEW/x.html")),
    ]
    for command, name, words in inside:
        for what, make in PATHS.items():
            if not what.endswith("too long") and what not in ("a user's who is not there", "in a file"):
                yield Case(
                    command, f"{name} in a folder: {what}", _inside(make, name, words), waits=what in _WAITED_FOR
                )


def _put(words: tuple[str, ...], path: Path | None = None, folder: Path | None = None) -> Callable[[Place], list[str]]:
    def made(place: Place) -> list[str]:
        names = {"PATH": str(path), "FOLDER": str(folder)}
        return [names.get(word) or place.path(word) for word in words]

    return made


def _with(make: Make, suffix: str, words: tuple[str, ...]) -> Callable[[Place], list[str]]:
    return lambda place: _put(words, path=make(place.folder / f"bad{suffix}"))(place)


def _inside(make: Make, name: str, words: tuple[str, ...]) -> Callable[[Place], list[str]]:
    def made(place: Place) -> list[str]:
        folder = place.folder / "folder"
        folder.mkdir()
        make(folder / name)
        return _put(words, folder=folder)(place)

    return made
