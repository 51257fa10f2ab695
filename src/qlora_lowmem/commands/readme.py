"""The README's figures, from `results/`: `qlora-lowmem readme` writes them between the markers."""

import argparse
import re
from pathlib import Path

from qlora_lowmem.errors import EXIT_OK, UsageError
from qlora_lowmem.files import read_json, read_text
from qlora_lowmem.results.kinds.matrix import readme_block
from qlora_lowmem.targets import check_file, write

CARD = "rtx-4050-laptop-6gb"
_BLOCK = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", default="results", metavar="DIR", help="where the tables are (default: results)")
    parser.add_argument("--readme", default="README.md", metavar="FILE", help="the file to write into")


def run(options: argparse.Namespace) -> int:
    source, readme = Path(options.results) / CARD / "matrix.json", Path(options.readme)
    check_file("--readme", options.readme)
    if not readme.is_file():
        raise UsageError(f"--readme: {options.readme!r} is no file; give the one that has the markers")
    try:
        content, text = read_json(source), read_text(readme)
    except OSError as error:
        raise UsageError(
            f"{error.filename}: {error.strerror}; run pytest bench/ --results results first, in the project's root"
        ) from None
    if not _BLOCK.search(text):
        raise UsageError(f"{readme} has no <!-- matrix --> ... <!-- /matrix -->; put the markers where the table goes")
    block = readme_block(content)
    write("--readme", options.readme, _BLOCK.sub(lambda found: found[1] + block + found[2], text))
    return EXIT_OK
